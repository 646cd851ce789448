"""Prompts as one agent wants them: rendered, wrapped in its chat template, tokenised. No torch here."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import count, groupby
from typing import Any, Protocol

from recmas.prompts.rows import Messages, earlier
from recmas.prompts.template import Slot, Template, shortened

PIECES = 4096  # texts between slots whose token ids an agent remembers


class ChatTemplateError(ValueError):
    """A chat template that raises an error."""


class Tokenizer(Protocol):
    """What the renderer needs of a transformers tokenizer."""

    chat_template: Any

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> Any: ...

    def __call__(self, text: str, **kwargs: Any) -> Any: ...


class PromptRenderer:
    """Turns a template and a row into token ids and slots, in the way one agent wants its prompts.

    Args:
        tokenizer: a transformers tokenizer; must not change any more, since ids of recent pieces are kept: every round
            and every epoch says them again.
        chat: wrap the prompt as one user message in the tokenizer's chat template, with the generation prompt; False
            takes the template as it is, special tokens only where written.
        system: system message (chat only); joined into the user message where the chat template has no such role.
        name: begins error messages.
        apply: the tokenizer's chat template, messages to text; None applies it here, without limits.

    Raises:
        ValueError: chat without a chat template, or a system message without chat.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat: bool,
        system: str | None = None,
        *,
        name: str = "agent",
        apply: Callable[[list[dict[str, str]]], str] | None = None,
    ) -> None:
        if chat and not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"{name}: the tokenizer has no chat template; set chat to false")
        if system and not chat:
            raise ValueError(f"{name}: system is set but chat is false; write it into the template")
        self.tokenizer, self.chat, self.system, self.name = tokenizer, chat, system, name
        self._applied = self._apply_here if apply is None else apply
        self._system_role: bool | None = None
        self._ids = lru_cache(PIECES)(self._tokenised)

    def _tokenised(self, piece: str) -> array[int]:
        return array("i", self.tokenizer(piece, add_special_tokens=False)["input_ids"])  # a ninth of a tuple's memory

    def segments(
        self, template: Template, row: Mapping[str, object], texts: Mapping[str, str] | None = None
    ) -> list[list[int] | Slot]:
        """Token ids between slots, each piece tokenised by itself; empty pieces are left out.

        Roles in `texts` are inserted as text, like a field (several in a joint slot: one after the other, a line
        each); the others stay slots. The earlier messages of a chat stand before the prompt in the chat template.

        Raises:
            ValueError: a missing field, a slot that the chat template dropped, a prompt with nothing in it, or earlier
                messages without a chat template that takes them.
        """
        pieces: list[str | Slot] = []
        for part in template.render(row):
            if isinstance(part, Slot) and texts and all(role in texts for role in part.senders):
                part = "\n".join(texts[role] for role in part.senders)
            pieces.append(part)
        pieces = [
            joined
            for is_slot, parts in groupby(pieces, lambda piece: isinstance(piece, Slot))
            for joined in (parts if is_slot else ["".join(str(part) for part in parts)])
        ]
        if self.chat:
            pieces = self._in_chat(pieces, earlier(row))
        else:
            self.check_chat(row)
        segments: list[list[int] | Slot] = []
        for piece in pieces:
            if isinstance(piece, Slot):
                segments.append(piece)
            elif ids := self._ids(piece):
                segments.append(list(ids))
        if not segments:
            raise ValueError(f"{self.name}: template {shortened(template.text)} renders to an empty prompt")
        return segments

    def check_chat(self, row: Mapping[str, object]) -> None:
        """Raise ValueError if the row has earlier messages and no chat template takes them."""
        if (before := earlier(row)) and not self.chat:
            raise ValueError(f"{self.name}: chat is false, so a row cannot have messages before its question")
        if before:
            self._chat_text("question", before)

    def _in_chat(self, pieces: Sequence[str | Slot], conversation: Messages) -> list[str | Slot]:
        """The chat template's text of the conversation and around the pieces, cut at the slots again."""
        slots = [piece for piece in pieces if isinstance(piece, Slot)]
        said = [message["content"] for message in conversation]
        stem = _unused_stem([piece for piece in pieces if isinstance(piece, str)] + [self.system or "", *said])
        sentinels = [f"{stem}{index}>" for index in range(len(slots))]
        waiting = iter(sentinels)
        text = self._chat_text(
            "".join(piece if isinstance(piece, str) else next(waiting) for piece in pieces), conversation
        )
        first, *others = re.split(rf"{re.escape(stem)}([0-9]+)>", text)
        found, texts = list(map(int, others[::2])), others[1::2]
        if found != list(range(len(slots))):
            occurs = Counter(found)
            for number, slot in enumerate(slots):
                if occurs[number] != 1:
                    raise ValueError(f"{self.name}: slot {slot} occurs {occurs[number]} times in the rendered prompt")
            raise ValueError(f"{self.name}: the slots stand in another order in the rendered prompt")
        cut = [first, *(piece for number, text in zip(found, texts, strict=True) for piece in (slots[number], text))]
        return [piece for piece in cut if piece]

    def _chat_text(self, content: str, before: Messages) -> str:
        messages = [*before, {"role": "user", "content": content}]
        given = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
        if system := "\n\n".join(text for text in (self.system, given) if text):
            if self._system_role is None:
                self._system_role = self._takes_system_role()
            if self._system_role:
                messages.insert(0, {"role": "system", "content": system})
            else:
                messages[0] = {"role": "user", "content": f"{system}\n\n{messages[0]['content']}"}
        try:
            return self._apply(messages)
        except ChatTemplateError as error:
            raise ValueError(f"{self.name}: the chat template refuses the messages: {error}") from None

    def _takes_system_role(self) -> bool:
        """False where the chat template refuses a system message or silently drops it."""
        probe = _unused_stem([self.system or ""]).strip()  # chat templates trim
        try:
            text = self._apply([{"role": "system", "content": probe}, {"role": "user", "content": "question"}])
        except ChatTemplateError:
            return False
        return probe in text

    def _apply(self, messages: list[dict[str, str]]) -> str:
        try:
            return self._applied(messages)
        except ChatTemplateError:
            raise
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None

    def _apply_here(self, messages: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        try:
            return str(self.tokenizer.apply_chat_template(messages, **options))
        except TemplateError as error:
            raise ChatTemplateError(str(error)) from None


def _unused_stem(texts: Sequence[str]) -> str:
    """A sentinel's beginning that occurs in none of the texts; it cannot overlap itself, '<' only begins it."""
    stems = (f"<recmas {number} " for number in count())
    return next(stem for stem in stems if not any(stem in text for text in texts))
