"""Prompts as one agent wants them: rendered, wrapped in its chat template, tokenised. No torch here."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple, Protocol

from recmas.prompts.rows import Messages, earlier, readable, text_of
from recmas.prompts.template import Slot, Template, shortened
from recmas.prompts.vocabulary import Special, check_ids

_MARK = re.compile(r"<recmas \d+ \d+>")  # the sentinels of `_Marks`
_STEM = re.compile(r"<recmas ([0-9]+) ")
PIECES = 4096  # texts between slots whose token ids an agent remembers


class _Way(NamedTuple):
    """How a chat template is applied: contents as lists of parts, and with an empty list of tools."""

    in_parts: bool
    tools: bool


_WAYS = [_Way(in_parts, tools) for tools in (False, True) for in_parts in (False, True)]


class ChatTemplateError(ValueError):
    """A chat template that raises an error."""


class Tokenizer(Protocol):
    """What the renderer needs of a transformers tokenizer."""

    chat_template: Any

    def apply_chat_template(self, conversation: list[dict[str, Any]], **kwargs: Any) -> Any: ...

    def __call__(self, text: str, **kwargs: Any) -> Any: ...


class PromptRenderer:
    """Turns a template and a row into token ids and slots, in the way one agent wants its prompts.

    Args:
        tokenizer: a transformers tokenizer; must not change any more, since ids of recent pieces are kept: every round
            and every epoch says them again.
        chat: wrap the prompt as one user message in the tokenizer's chat template, with the generation prompt; False
            takes the template as it is, behind the tokenizer's own BOS, with other special tokens only where written.
        system: system message (chat only); joined into the user message where the chat template has no such role.
        name: begins error messages.
        apply: the tokenizer's chat template, messages and tools to text; None applies it here, without limits.
        vocabulary: embeddings of the agent's table; None does not look.

    Raises:
        ValueError: chat without a chat template, or a system message without chat or with half of a surrogate pair.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat: bool,
        system: str | None = None,
        *,
        name: str = "agent",
        apply: Callable[[list[dict[str, Any]], list[Any] | None], str] | None = None,
        vocabulary: int | None = None,
    ) -> None:
        if chat and not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"{name}: the tokenizer has no chat template; set chat to false")
        if system and not chat:
            raise ValueError(f"{name}: system is set but chat is false; write it into the template")
        readable(system or "", f"{name}: system")
        self.tokenizer, self.chat, self.system, self.name = tokenizer, chat, system, name
        self._applied = self._apply_here if apply is None else apply
        self._vocabulary = vocabulary
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = Special([token.content for token in added.values() if token.special])
        self._ways: dict[tuple[str, ...], _Way | str] = {}
        self._first: list[int] | None = None  # ids that a plain prompt begins with
        self._ids = lru_cache(PIECES)(self._tokenised)

    def _tokenised(self, piece: str) -> array[int]:
        return array("i", self._known(self.tokenizer(piece, add_special_tokens=False)))  # a ninth of a tuple's memory

    def _literal_ids(self, text: str) -> list[int]:
        return self._known(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True))

    def _known(self, encoded: Any) -> list[int]:
        """The ids, which the agent's model must know."""
        ids = list(encoded["input_ids"])
        if self._vocabulary is not None:
            check_ids(ids, self._vocabulary, self.tokenizer, self.name)
        return ids

    def segments(
        self, template: Template, row: Mapping[str, object], texts: Mapping[str, str] | None = None
    ) -> list[list[int] | Slot]:
        """Token ids between slots, each piece tokenised by itself; empty pieces are left out.

        Roles in `texts` are inserted as text, like a field (several in a joint slot: one after the other, a line
        each); the others stay slots. The earlier messages of a chat stand before the prompt in the chat template.
        What is inserted is plain text: a special token that it spells is tokenised as its characters.

        Raises:
            ValueError: a missing field or one without a text, a chat template that fails, drops or changes the prompt
                or a slot, a prompt with nothing in it, a token that the model does not know, or earlier messages
                without a chat template that takes them.
        """
        marks = _Marks([template.text, self.system or "", *_contents(row, texts)], self._special)
        inserted = {role: marks.literal(text) for role, text in (texts or {}).items()}
        given = {name: value for name, value in row.items() if name in template.fields}
        fields = {name: marks.literal(text_of(value, f"field {name!r}")) for name, value in given.items()}
        pieces: list[str] = []
        for part in template.render({**row, **fields}):
            if isinstance(part, Slot) and all(role in inserted for role in part.senders):
                pieces.append("\n".join(inserted[role] for role in part.senders))
            else:
                pieces.append(marks.slot(part) if isinstance(part, Slot) else part)
        prompt = "".join(pieces)
        if self.chat:
            before = tuple({**message, "content": marks.literal(message["content"])} for message in earlier(row))
            prompt = self._chat_text(prompt, before)
        else:
            self.check_chat(row)
        segments: list[list[int] | Slot] = []
        for piece in marks.cut(prompt, self.name):
            if isinstance(piece, Slot):
                segments.append(piece)
            elif ids := self._literal_ids(piece.text) if isinstance(piece, _Literal) else self._ids(piece):
                if segments and isinstance(segments[-1], list):
                    segments[-1] += ids
                else:
                    segments.append(list(ids))
        if not segments:
            raise ValueError(f"{self.name}: template {shortened(template.text)} renders to an empty prompt")
        return segments if self.chat else self._begun(segments)

    def check_chat(self, row: Mapping[str, object]) -> None:
        """Raise ValueError if the row has earlier messages and no chat template takes them."""
        if (before := earlier(row)) and not self.chat:
            raise ValueError(f"{self.name}: chat is false, so a row cannot have messages before its question")
        if before:
            self._chat_text("question", before)

    def _begun(self, segments: list[list[int] | Slot]) -> list[list[int] | Slot]:
        """A plain prompt behind the ids that the tokenizer's own pipeline puts first (BOS), once."""
        if self._first is None:
            alone = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
            whole = self._known(self.tokenizer("a"))
            starts = (at for at in range(len(whole)) if whole[at : at + len(alone)] == alone)
            self._first = whole[: next(starts, 0)]
        head = segments[0]
        if not self._first or (isinstance(head, list) and head[: len(self._first)] == self._first):
            return segments
        return [self._first + head, *segments[1:]] if isinstance(head, list) else [list(self._first), *segments]

    def _chat_text(self, content: str, before: Messages) -> str:
        messages = [*before, {"role": "user", "content": content}]
        given = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
        if system := "\n\n".join(text for text in (self.system, given) if text):
            if isinstance(self._way(("system", "user")), _Way):
                messages.insert(0, {"role": "system", "content": system})
            else:
                messages[0] = {"role": "user", "content": f"{system}\n\n{messages[0]['content']}"}
        return self._rendered(messages)

    def _rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The chat template's text of messages, which must hold each of them as it is."""
        way = self._way(tuple(message["role"] for message in messages))
        if isinstance(way, str):
            raise ValueError(f"{self.name}: the chat template {way}")
        try:
            text = self._apply(messages, way)
        except ChatTemplateError as error:
            raise ValueError(f"{self.name}: the chat template refuses the messages: {error}") from None
        for piece in (piece for message in messages for piece in _lost(message["content"], text)):
            raise ValueError(f"{self.name}: the chat template drops or changes {shortened(piece)}")
        return text

    def _way(self, roles: tuple[str, ...]) -> _Way | str:
        """The first way in which the chat template shows messages of these roles, or why there is none.

        The messages are ones that nothing else spells (what is short, a number say, may stand in the template, too),
        and of two lines, which a list of parts that is printed as it is does not show.
        """
        if roles not in self._ways:
            messages = [{"role": role, "content": f"<recmas\nmessage {at}>"} for at, role in enumerate(roles)]
            problem = ""
            for way in _WAYS:
                try:
                    text = self._apply(messages, way)
                except ChatTemplateError as error:
                    problem = problem or f"refuses the messages: {error}"
                    continue
                lost = next((message["role"] for message in messages if message["content"] not in text), None)
                if lost is None:
                    self._ways[roles] = way
                    break
                problem = problem or f"drops or changes what the {lost} says"
            else:
                self._ways[roles] = problem
        return self._ways[roles]

    def _apply(self, messages: Sequence[Mapping[str, str]], way: _Way) -> str:
        conversation: list[dict[str, Any]] = [dict(message) for message in messages]
        if way.in_parts:
            for message in conversation:
                message["content"] = [{"type": "text", "text": message["content"]}]
        try:
            return self._applied(conversation, [] if way.tools else None)
        except ChatTemplateError:
            raise
        except ValueError as error:  # a limit
            raise ValueError(f"{self.name}: {error}") from None

    def _apply_here(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False, "tools": tools}
        try:
            return str(self.tokenizer.apply_chat_template(messages, **options))
        except Exception as error:  # a template is a program of the model's author, and fails as programs do
            kind, reason = type(error).__name__, " ".join(str(error).split())
            raise ChatTemplateError(reason if kind == "TemplateError" and reason else f"{kind}: {reason}") from None


@dataclass(frozen=True)
class _Literal:
    text: str


class _Marks:
    """Sentinels that stand for slots, and for inserted texts that spell special tokens, until the text is cut at them.

    Args:
        texts: all that the prompt is made of; no sentinel occurs in any of them.
        special: whether a text becomes a special token.
    """

    def __init__(self, texts: Sequence[str], special: Callable[[str], bool]) -> None:
        self._stem, self._special = unused_stem(texts), special
        self._marked: list[Slot | _Literal] = []

    def _mark(self, what: Slot | _Literal) -> str:
        self._marked.append(what)
        return f"{self._stem}{len(self._marked) - 1}>"

    def slot(self, slot: Slot) -> str:
        """The sentinel of a slot, which must occur once in the rendered prompt."""
        return self._mark(slot)

    def literal(self, text: str) -> str:
        """The text itself, or a sentinel for one that spells a special token."""
        return self._mark(_Literal(text)) if self._special(text) else text

    def cut(self, text: str, name: str) -> list[str | Slot | _Literal]:
        """The text's pieces; ValueError unless every slot occurs once, in their own order."""
        first, *others = re.split(rf"{re.escape(self._stem)}([0-9]+)>", text)
        found, texts = list(map(int, others[::2])), others[1::2]
        slots = [number for number, marked in enumerate(self._marked) if isinstance(marked, Slot)]
        occurs = Counter(found)
        for number in slots:
            if occurs[number] != 1:
                slot = self._marked[number]
                raise ValueError(f"{name}: slot {slot} occurs {occurs[number]} times in the rendered prompt")
        if [number for number in found if isinstance(self._marked[number], Slot)] != slots:
            raise ValueError(f"{name}: the slots stand in another order in the rendered prompt")
        pieces: list[str | Slot | _Literal] = [first]
        for number, after in zip(found, texts, strict=True):
            pieces += [self._marked[number], after]
        return [piece for piece in pieces if piece != ""]


def _lost(content: str, text: str) -> Iterator[str]:
    """The pieces between a message's sentinels that do not stand in a text one after the other."""
    position = 0
    for piece in map(str.strip, _MARK.split(content)):
        found = text.find(piece, position)
        if found < 0:
            yield piece
        else:
            position = found + len(piece)


def _contents(row: Mapping[str, object], texts: Mapping[str, str] | None) -> list[str]:
    """All texts that may be inserted into a prompt."""
    return [*map(str, row.values()), *(texts or {}).values(), *(message["content"] for message in earlier(row))]


def unused_stem(texts: Sequence[str]) -> str:
    """A sentinel's beginning that occurs in none of the texts; it cannot overlap itself, '<' only begins it."""
    used = {number for text in texts for number in _STEM.findall(text)}
    return next(f"<recmas {number} " for number in count() if str(number) not in used)
