"""State dicts read as data: what torch wrote comes back bit for bit, and nothing else is run or allocated."""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch

from recmas_kernels import FusedRecursiveLink
from recmas_kernels.pickled import read_state_dict

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_of_what_torch_wrote_comes_back(tmp_path, dtype):
    whole = torch.arange(24).reshape(4, 6).to(dtype)
    state = {
        "whole": whole,
        "transposed": whole.t(),
        "part": whole[1:3, ::2],
        "scalar": whole[0, 0],
        "empty": whole[:0],
        "parameter": torch.nn.Parameter(whole.clone(), requires_grad=False),
    }
    torch.save(OrderedDict(state), tmp_path / "state.pt")
    read = read_state_dict(tmp_path / "state.pt")
    assert list(read) == list(state)
    for name, value in state.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value), name


def test_a_module_s_state_dict_with_its_metadata(tmp_path):
    link = FusedRecursiveLink.inner(8)
    torch.save(link.state_dict(), tmp_path / "link.pt")
    read = read_state_dict(tmp_path / "link.pt")
    assert all(torch.equal(read[name], value) for name, value in link.state_dict().items())


class Reduced:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.called = (function, arguments)

    def __reduce__(self):
        return self.called


def archive(content: bytes, compression=zipfile.ZIP_STORED, **entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as made:
        made.writestr("archive/data.pkl", content)
        for name, entry in entries.items():
            made.writestr(f"archive/data/{name.lstrip('_')}", entry)
    return buffer.getvalue()


PLACE = object()  # of the storage in a pickled tensor


def tensor(shape: tuple[int, ...], strides: tuple[int, ...], elements: int, offset: int = 0) -> bytes:
    """A pickle of {"proj1.weight": a tensor of this description}, its storage's elements aside."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", elements) if value is PLACE else None

    buffer = io.BytesIO()
    rebuilt = Reduced(torch._utils._rebuild_tensor_v2, PLACE, offset, shape, strides, False, OrderedDict())
    Pickler(buffer, protocol=2).dump({"proj1.weight": rebuilt})
    return buffer.getvalue()


HUGE = 1 << 36  # 64 GiB
HOSTILE = {
    "a bytearray of 64 GiB": archive(pickle.dumps(Reduced(bytearray, HUGE), 2)),
    "code": archive(pickle.dumps(Reduced(os.system, "touch /tmp/recmas-was-here"), 2)),
    "a memo slot far away": archive(b"\x80\x02}r" + struct.pack("<I", 2**31 - 1) + b"."),
    "a memo slot far away and a broken end": archive(b"\x80\x02}r" + struct.pack("<I", 2**31 - 1)),
    "a tensor of stride 0": archive(tensor((HUGE,), (0,), 1), _0=bytes(4)),
    "a storage larger than its entry": archive(tensor((HUGE,), (1,), HUGE), _0=bytes(4)),
    "a tensor larger than its storage": archive(tensor((2, 2), (2, 1), 3), _0=bytes(12)),
    "a tensor behind its storage": archive(tensor((1,), (1,), 1, offset=7), _0=bytes(4)),
    "a negative stride": archive(tensor((2,), (-1,), 2, offset=1), _0=bytes(8)),
    "a storage that is not there": archive(tensor((1,), (1,), 1)),
    "compressed entries": archive(tensor((1 << 20,), (1,), 1 << 20), zipfile.ZIP_DEFLATED, _0=bytes(4 << 20)),
    "an endless text": archive(b"\x80\x02X" + struct.pack("<I", 2**31 - 1) + b"."),
    "a pickle that pops nothing": archive(b"\x80\x02R."),
    "no state dict": archive(pickle.dumps([1, 2], 2)),
    "no pickle": archive(b"").replace(b"data.pkl", b"data.txt"),
    "a text": b"hello",
    "nothing": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_one_line_and_allocate_nothing(tmp_path, name):
    path = tmp_path / "adapter.pt"
    path.write_bytes(HOSTILE[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if name == "a memo slot far away":  # sound, but no link
        assert read_state_dict(path) == {}
    with pytest.raises(ValueError, match="adapter.pt|proj1") as raised:
        FusedRecursiveLink.from_upstream(path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10
    assert not os.path.exists("/tmp/recmas-was-here")


def test_a_bit_that_flipped_in_an_entry_is_told(tmp_path):
    torch.save({"proj1.weight": torch.ones(64)}, tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    content[content.index(b"\x00\x00\x80\x3f" * 4) + 2] ^= 1
    (tmp_path / "x.pt").write_bytes(bytes(content))
    with pytest.raises(ValueError, match="Bad CRC-32"):
        read_state_dict(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["adapter.pt", "adapter.safetensors", "adapter_config.json"])
def test_a_fifo_is_not_waited_for(tmp_path, name):
    torch.save({}, tmp_path / "adapter.pt")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    source = tmp_path / name if name.endswith("safetensors") else tmp_path
    with pytest.raises(ValueError, match=f"{name} is no regular file"):
        FusedRecursiveLink.from_upstream(source)


def saved_link(folder):
    FusedRecursiveLink.inner(8).save_pretrained(folder)
    return folder / "config.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace(": 8", ": 1000000000000"), "does not fit into the .* bytes of model.safetensors"),
        (lambda text: "[" * 100_000, "config.json is not JSON: nested too deeply"),
        (lambda text: text.replace(": 8", ": " + "9" * 5000), "config.json is not JSON: Exceeds the limit"),
        (lambda text: text + " " * (2 << 20), "config.json has .* bytes, at most"),
    ],
    ids=["huge features", "deep", "a number of 5000 digits", "2 MiB"],
)
def test_hostile_configurations_of_links_are_one_line(tmp_path, change, message):
    config = saved_link(tmp_path)
    config.write_text(change(config.read_text()))
    with pytest.raises(ValueError, match=message):
        FusedRecursiveLink.from_pretrained(tmp_path)
