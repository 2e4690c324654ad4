"""An answer as OpenAI's clients read it: one object, or a stream of server-sent events."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from triptych.request import TokenEvent
from triptych.router.detokenize import REPLACEMENT

JSON = "application/json"
EVENTS = "text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Delta:
    """What one or several tokens add to the answer."""

    text: str
    events: tuple[TokenEvent, ...]
    """The tokens that belong to the answer's text; a finishing end token is not among them."""
    finish: str = ""
    """"", "stop" or "length"."""


class Usage(msgspec.Struct, frozen=True):
    """``prompt_tokens``: after images were expanded. ``completion_tokens``: every token the model
    chose, the end token included, as OpenAI counts; of an answer that ends at a stop string, up to
    the token that completed it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChunkDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class ChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: ChunkDelta
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


class Chunk(msgspec.Struct, frozen=True):
    id: str
    object: str
    created: int
    model: str
    choices: tuple[ChunkChoice, ...]
    usage: Usage | None | msgspec.UnsetType = msgspec.UNSET


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
    ) -> None:
        """``piece``: text of one token. ``logprobs``: as ``Sampling.logprobs``."""
        self._id = completion_id(request_id)
        self._model = model
        self._created = int(time.time())
        self._piece = piece
        self._logprobs = logprobs
        self._usage: Usage | None | msgspec.UnsetType = None if usage_in_stream else msgspec.UNSET
        self._texts: list[str] = []
        self._tokens: list[dict[str, Any]] = []
        self._finish = ""

    # ------------------------------------------------------------------ streamed

    def opening(self) -> bytes:
        """The first event: who speaks."""
        return self._event((ChunkChoice(0, ChunkDelta(role="assistant", content="")),))

    def events(self, delta: Delta) -> bytes:
        """The events of ``delta``; b"" when it adds nothing to see."""
        found = b""
        logprobs = self._logprobs_of(delta.events)
        if delta.text or logprobs:
            choice = ChunkChoice(0, ChunkDelta(content=delta.text), logprobs=logprobs)
            found = self._event((choice,))
        if delta.finish:
            found += self._event((ChunkChoice(0, ChunkDelta(), finish_reason=delta.finish),))
        return found

    def closing(self, usage: Usage) -> bytes:
        """The last events: usage if it was asked for, then the end."""
        if self._usage is msgspec.UNSET:
            return DONE
        self._usage = usage
        return self._event(()) + DONE

    def _event(self, choices: tuple[ChunkChoice, ...]) -> bytes:
        chunk = Chunk(
            self._id, "chat.completion.chunk", self._created, self._model, choices, self._usage
        )
        return b"data: " + msgspec.json.encode(chunk) + b"\n\n"

    # ------------------------------------------------------------------ whole

    def add(self, delta: Delta) -> None:
        self._texts.append(delta.text)
        self._finish = delta.finish
        if logprobs := self._logprobs_of(delta.events):
            self._tokens += logprobs["content"]

    def whole(self, usage: Usage) -> bytes:
        """JSON of the answer once its last delta has been added."""
        message = {"role": "assistant", "content": "".join(self._texts), "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": self._finish,
            "logprobs": None if self._logprobs < 0 else {"content": self._tokens, "refusal": None},
        }
        return msgspec.json.encode(
            {
                "id": self._id,
                "object": "chat.completion",
                "created": self._created,
                "model": self._model,
                "choices": [choice],
                "usage": usage,
            }
        )

    # ------------------------------------------------------------------ logprobs

    def _logprobs_of(self, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
        if self._logprobs < 0 or not events:
            return None
        return {"content": [self._logprob(event) for event in events], "refusal": None}

    def _logprob(self, event: TokenEvent) -> dict[str, Any]:
        top = [self._entry(likely.token, likely.logprob) for likely in event.top]
        return {**self._entry(event.token, event.logprob or 0.0), "top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._piece(token)
        # A part of a character has no text of its own, and the bytes behind it are not known here.
        known = None if REPLACEMENT in text else list(text.encode())
        return {"token": text, "logprob": logprob, "bytes": known}


def error_event(body: dict[str, Any]) -> bytes:
    """An error that came after the first token: the stream's last event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
