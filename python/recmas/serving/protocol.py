"""What a chat request holds, and what answers it: the OpenAI interface, and the fields of ours beside it."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from recmas.answering.answers import Answer
from recmas.answering.options import AnswerOptions
from recmas.prompts.rows import Fields, read_row
from recmas.serving.errors import ApiError
from recmas.serving.settings import ServeSettings

Name = Annotated[str, Field(max_length=64)]

_NOT_DONE: dict[str, list[Any]] = {
    "n": [1],
    "stop": [[]],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "logprobs": [False],
    "top_logprobs": [0],
    "logit_bias": [{}],
    "frequency_penalty": [0],
    "presence_penalty": [0],
}
"""OpenAI's fields that this server does not do, and the values at which they ask for nothing."""


_SAYS_NOTHING: list[Any] = [None, [], {}]
"""Values at which other fields of a message say nothing; clients send answers back with such fields."""


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message: (system,) user, assistant, ..., user; the last one is the question."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _what_says_nothing(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if name in cls.model_fields or value not in _SAYS_NOTHING}


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    model_config = ConfigDict(extra="ignore", strict=True)
    include_usage: bool = False


class ChatRequest(BaseModel):
    """A request for one answer.

    `mode`, `rounds`, `latent_steps`, `fields` and `trace` are ours (``extra_body`` of the official client). Null stands
    for a field that is left out. Fields that bear no influence on the answer, and others of OpenAI's at values that ask
    for nothing, are taken and left alone; all others are refused.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    model: Annotated[str, Field(max_length=256)]
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int | None, Field(ge=0)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=0)] = None
    temperature: Annotated[float | None, Field(ge=0, le=100, allow_inf_nan=False)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    mode: Literal["latent", "text"] = "latent"
    rounds: Annotated[int | None, Field(ge=1)] = None
    latent_steps: Annotated[int, Field(ge=0)] | dict[Name, Annotated[int, Field(ge=0)]] | None = None
    fields: dict[Name, str | int | float] = {}
    trace: bool = False
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _what_asks_for_nothing(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, value in given.items():
            if value is not None and name in _NOT_DONE and not _asks_for_nothing(name, value):
                raise PydanticCustomError("not_done", "this server does not do `{name}`", {"name": name})
        return {name: value for name, value in given.items() if value is not None and name not in _NOT_DONE}

    @model_validator(mode="after")
    def _what_would_be_ignored(self) -> ChatRequest:
        for name, ignored in (
            ("latent_steps", self.mode == "text" and self.latent_steps is not None),
            ("stream_options", not self.stream and self.stream_options is not None),
        ):
            if ignored:
                why = "mode is text" if name == "latent_steps" else "stream is false"
                raise PydanticCustomError("ignored", "{name}: {why}", {"name": name, "why": why})
        return self

    def options(self, settings: ServeSettings) -> AnswerOptions:
        """How the question is answered.

        Raises:
            ApiError: more than `settings` allow.
        """
        asked = [count for count in (self.max_tokens, self.max_completion_tokens) if count is not None]
        most = self.latent_steps.values() if isinstance(self.latent_steps, dict) else [self.latent_steps or 0]
        for name, value, bound in (
            ("max_tokens", max(asked, default=0), settings.max_tokens),
            ("rounds", self.rounds or 1, settings.max_rounds),
            ("latent_steps", max(most, default=0), settings.max_latent_steps),
        ):
            if value > bound:
                raise ApiError(400, f"{name}: {value} is more than the {bound} of this server", "too_much", name)
        return AnswerOptions(
            mode=self.mode,
            rounds=self.rounds,
            latent_steps=self.latent_steps,
            max_new_tokens=min(asked) if asked else None,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )

    def row(self) -> Fields:
        """The question, as a row.

        Raises:
            ValueError: messages in no order of a chat.
        """
        if "question" in self.fields or "messages" in self.fields:
            raise ValueError("fields: question and messages come from the messages of the request")
        said = [{"role": message.role, "content": _text(message)} for message in self.messages]
        row = read_row({**self.fields, "messages": said}, 0)
        return row


def read_request(body: bytes) -> ChatRequest:
    """The request of a body.

    Raises:
        ApiError: no JSON, or a field that is wrong.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        wrong = [(one, _place(one["loc"], one["type"], body)) for one in error.errors(include_url=False)]
        # A value that may be of several kinds is told of as the kind that it is most like.
        first, place = max(wrong, key=lambda pair: len(pair[1]))
        where = ".".join(map(str, place)) or str(first.get("ctx", {}).get("name", ""))
        if first["type"] in ("not_done", "ignored"):
            raise ApiError(400, first["msg"], "invalid_value", where) from None
        kind = "invalid_json" if first["type"] == "json_invalid" else "invalid_value"
        raise ApiError(400, f"{where}: {first['msg']}" if where else first["msg"], kind, where or None) from None


def usage(answer: Answer, positions: int) -> dict[str, Any]:
    """What an answer took; text of all agents counts as completion, all prompts' positions as prompt."""
    written, thought = sum(answer.text_tokens.values()), sum(answer.latent_steps.values())
    return {
        "prompt_tokens": positions,
        "completion_tokens": written,
        "total_tokens": positions + written,
        "latent_steps": thought,
        "text_tokens_by_role": answer.text_tokens,
        "latent_steps_by_role": answer.latent_steps,
    }


class Reply:
    """The objects that answer one request, for `identity` and `model`."""

    def __init__(self, identity: str, model: str) -> None:
        self._common = {"id": identity, "created": int(time.time()), "model": model}

    def whole(self, answer: Answer, finish: str, took: dict[str, Any], visits: list[Any] | None) -> dict[str, Any]:
        """The answer in one piece."""
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
        traced = {} if visits is None else {"recmas": {"visits": visits}}
        return {**self._common, "object": "chat.completion", "choices": [choice], "usage": took, **traced}

    def chunk(self, delta: dict[str, Any], finish: str | None = None) -> bytes:
        """An event with a piece of the answer."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return event({**self._common, "object": "chat.completion.chunk", "choices": [choice]})

    def beside(self, **fields: Any) -> bytes:
        """An event without a piece: usage, or a visit."""
        return event({**self._common, "object": "chat.completion.chunk", "choices": [], **fields})


def event(content: Any) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


def _place(path: tuple[str | int, ...], problem: str, body: bytes) -> list[str | int]:
    """Where something is wrong, as the request has it: pydantic also names the kinds that it took a value for."""
    found: Any = json.loads(body, parse_int=str) if path else None  # Python reads no integer of 5000 digits
    there: list[str | int] = []
    for number, step in enumerate(path, start=1):
        try:
            found = found[step]
        except (LookupError, TypeError):
            if problem != "missing" or number < len(path):
                continue
        there.append(step)
    return there


def _asks_for_nothing(name: str, value: Any) -> bool:
    """Whether a field has one of its values in `_NOT_DONE`; in Python, though not in JSON, true equals 1."""
    return any(value == each and isinstance(value, bool) is isinstance(each, bool) for each in _NOT_DONE[name])


def _text(message: ChatMessage) -> str:
    return message.content if isinstance(message.content, str) else "".join(part.text for part in message.content)
