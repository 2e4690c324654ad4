"""An answer as OpenAI's clients read it: one object, or a stream of server-sent events."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from triptych.request import TokenEvent
from triptych.router.detokenize import REPLACEMENT

JSON = "application/json"
EVENTS = "text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"


class Delta(msgspec.Struct, frozen=True):
    """What one or several tokens add to the answer."""

    text: str
    events: tuple[TokenEvent, ...]
    """The tokens that belong to the answer's text; a finishing end token is not among them."""
    finish: str = ""
    """"", "stop" or "length"."""
    choice: int = 0
    """Which of the request's answers it belongs to."""


class Usage(msgspec.Struct, frozen=True):
    """``prompt_tokens``: after images were expanded. ``completion_tokens``: every token the model
    chose, the end token included, as OpenAI counts; of an answer that ends at a stop string, up to
    the token that completed it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int] | None
    """None: a part of a character."""


class TokenLogprob(TopLogprob, frozen=True):
    top_logprobs: list[TopLogprob]


class Logprobs(msgspec.Struct, frozen=True):
    content: list[TokenLogprob]
    refusal: None = None


class ChunkDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class ChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: ChunkDelta
    finish_reason: str | None = None
    logprobs: Logprobs | None = None


class Chunk(msgspec.Struct, frozen=True):
    """One event of a streamed answer."""

    id: str
    object: str
    created: int
    model: str
    choices: tuple[ChunkChoice, ...]
    usage: Usage | None | msgspec.UnsetType = msgspec.UNSET


class Message(msgspec.Struct, frozen=True):
    role: str
    content: str
    refusal: None = None


class Choice(msgspec.Struct, frozen=True):
    index: int
    message: Message
    finish_reason: str
    logprobs: Logprobs | None


class Completion(msgspec.Struct, frozen=True):
    """A whole answer."""

    id: str
    object: str
    created: int
    model: str
    choices: tuple[Choice, ...]
    usage: Usage


class ModelCard(msgspec.Struct, frozen=True):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "triptych"


class ModelList(msgspec.Struct, frozen=True):
    data: tuple[ModelCard, ...]
    object: Literal["list"] = "list"


def completion_id(request_id: str) -> str:
    return f"chatcmpl-{request_id}"


class Answer:
    """Builds the bytes of one request's answer, streamed or whole."""

    def __init__(
        self,
        request_id: str,
        model: str,
        *,
        piece: Callable[[int], str],
        logprobs: int,
        usage_in_stream: bool,
        n_choices: int = 1,
    ) -> None:
        """``piece``: text of one token. ``logprobs``: as ``Sampling.logprobs``."""
        self._id = completion_id(request_id)
        self._model = model
        self._created = int(time.time())
        self._piece = piece
        self._logprobs = logprobs
        self._usage_in_stream = usage_in_stream
        chunk = Chunk(self._id, "chat.completion.chunk", self._created, model, ())
        self._begin = b"data: " + msgspec.json.encode(chunk).removesuffix(b"[]}")
        """Of an event, up to its choices; no two events of an answer begin otherwise."""
        self._end = b',"usage":null}\n\n' if usage_in_stream else b"}\n\n"
        self._choices = [_Whole() for _ in range(n_choices)]

    # ------------------------------------------------------------------ streamed

    def opening(self) -> bytes:
        """The first event of each choice: who speaks."""
        said = ChunkDelta(role="assistant", content="")
        return b"".join(
            self._event((ChunkChoice(index, said),)) for index in range(len(self._choices))
        )

    def events(self, delta: Delta) -> bytes:
        """The events of ``delta``; b"" when it adds nothing to see."""
        found = b""
        logprobs = self._logprobs_of(delta.events)
        if delta.text or logprobs:
            said = ChunkDelta(content=delta.text)
            found = self._event((ChunkChoice(delta.choice, said, logprobs=logprobs),))
        if delta.finish:
            end = ChunkChoice(delta.choice, ChunkDelta(), finish_reason=delta.finish)
            found += self._event((end,))
        return found

    def closing(self, usage: Usage) -> bytes:
        """The last events: usage if it was asked for, then the end."""
        if not self._usage_in_stream:
            return DONE
        shown = msgspec.json.encode(usage)
        return b"".join((self._begin, b'[],"usage":', shown, b"}\n\n", DONE))

    def _event(self, choices: tuple[ChunkChoice, ...]) -> bytes:
        """A ``Chunk``."""
        return b"".join((self._begin, msgspec.json.encode(choices), self._end))

    # ------------------------------------------------------------------ whole

    def add(self, delta: Delta) -> None:
        choice = self._choices[delta.choice]
        choice.texts.append(delta.text)
        choice.finish = delta.finish
        if logprobs := self._logprobs_of(delta.events):
            choice.tokens += logprobs.content

    def whole(self, usage: Usage) -> bytes:
        """JSON of the answer once the last delta of each choice has been added."""
        choices = tuple(
            Choice(
                index,
                Message("assistant", "".join(choice.texts)),
                choice.finish,
                None if self._logprobs < 0 else Logprobs(choice.tokens),
            )
            for index, choice in enumerate(self._choices)
        )
        return msgspec.json.encode(
            Completion(self._id, "chat.completion", self._created, self._model, choices, usage)
        )

    # ------------------------------------------------------------------ logprobs

    def _logprobs_of(self, events: Sequence[TokenEvent]) -> Logprobs | None:
        if self._logprobs < 0 or not events:
            return None
        return Logprobs([self._logprob(event) for event in events])

    def _logprob(self, event: TokenEvent) -> TokenLogprob:
        top = [TopLogprob(*self._entry(likely.token, likely.logprob)) for likely in event.top]
        return TokenLogprob(*self._entry(event.token, event.logprob or 0.0), top)

    def _entry(self, token: int, logprob: float) -> tuple[str, float, list[int] | None]:
        text = self._piece(token)
        # A part of a character has no text of its own, and the bytes behind it are not known here.
        known = None if REPLACEMENT in text else list(text.encode())
        return text, logprob, known


@dataclass
class _Whole:
    """A choice until its answer is whole."""

    texts: list[str] = field(default_factory=list)
    tokens: list[TokenLogprob] = field(default_factory=list)
    finish: str = ""


def error_event(body: dict[str, Any]) -> bytes:
    """An error that came after the first token: the stream's last event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
