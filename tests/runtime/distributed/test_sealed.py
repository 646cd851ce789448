"""A sealed message is read as it was written; one that was changed, replayed or made by others is not read at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recmas.distributed.sealed import RefusedError, Stamp, seal, unseal
from recmas.engine.messages import Latents, Message

KEY = b"k" * 32
STAMP = Stamp("a" * 64, "b" * 64, "planner", 7)


def latents(*shape: int, dtype: torch.dtype = torch.float32, lengths: list[int] | None = None) -> Latents:
    states = torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    return Latents(states, None if lengths is None else torch.tensor(lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 2, 8), (1, 0, 8), (0, 2, 8)])
def test_latents_arrive_bit_for_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    sent = latents(*shape, dtype=dtype)
    found = unseal(seal(sent, STAMP, KEY), STAMP, KEY)
    assert isinstance(found, Latents)
    assert found.states.dtype == dtype
    assert found.states.shape == shape
    assert torch.equal(found.states, sent.states)
    assert found.lengths is None


def test_strided_latents_lengths_and_texts_arrive() -> None:
    sent = Latents(latents(4, 3, 8).states.transpose(0, 1)[:, ::2], torch.tensor([2, 0, 1]))
    found = unseal(seal(sent, STAMP, KEY), STAMP, KEY)
    assert isinstance(found, Latents)
    assert torch.equal(found.states, sent.states)
    assert found.counts() == [2, 0, 1]
    texts = ["", "a\nb", "é😀", "\ud83d"]
    assert unseal(seal(texts, STAMP, KEY), STAMP, KEY) == texts


def test_no_numbers_are_written_as_text() -> None:
    sent = latents(2, 2, 8)
    assert sent.states.numpy().tobytes() in seal(sent, STAMP, KEY)


@pytest.mark.parametrize("message", [latents(2, 2, 8), latents(2, 2, 8, lengths=[1, 2]), ["fox", "dog"]])
def test_a_change_of_any_byte_is_refused(message: Message) -> None:
    sealed = seal(message, STAMP, KEY)
    for place in range(len(sealed)):
        changed = bytearray(sealed)
        changed[place] ^= 1
        with pytest.raises(RefusedError, match="'planner'"):
            unseal(bytes(changed), STAMP, KEY)
    for cut in (sealed[:-1], sealed[1:], sealed[:20], b"", sealed + b"\0"):
        with pytest.raises(RefusedError):
            unseal(cut, STAMP, KEY)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"task": 6}, "task"),
        ({"sender": "critic"}, "sender"),
        ({"link": "c" * 64}, "link"),
        ({"system": "c" * 64}, "system"),
    ],
)
def test_an_honest_message_in_anothers_place_is_refused(changed: dict[str, object], name: str) -> None:
    sealed = seal(latents(2, 2, 8), replace(STAMP, **changed), KEY)
    with pytest.raises(RefusedError, match=f"another one: its {name} is"):
        unseal(sealed, STAMP, KEY)


def test_another_runs_message_is_refused() -> None:
    with pytest.raises(RefusedError, match="another run"):
        unseal(seal(["fox"], STAMP, b"j" * 32), STAMP, KEY)


def test_other_dtypes_are_not_sent() -> None:
    with pytest.raises(TypeError, match="latents of float64"):
        seal(latents(1, 1, 1, dtype=torch.float64), STAMP, KEY)
