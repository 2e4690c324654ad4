"""OpenAI's chat completions as this server takes them: strict types in, OpenAI's errors out.

A field that is unknown, of the wrong type or known but not supported is refused by name. Nothing
that would change the answer is ignored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from triptych.errors import BadRequest, ClientError, Overloaded, TriptychError, Unauthorized
from triptych.request import Detail, Kind

MAX_STOPS = 4
MAX_TOP_LOGPROBS = 20
SEED_BITS = 63
DEFAULT_MAX_TOKENS = 1024
"""Most tokens of an answer to a request that sets no limit (less where less fits)."""

_ROLES = {"developer": "system"}
"""Chat templates know the older name."""


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class ImageURL(Strict, frozen=True):
    url: str
    detail: Literal["auto", "high", "low"] | None = None
    """"auto" is "high": what the model's own processor makes of the image."""


class TextPart(Strict, frozen=True, tag_field="type", tag="text"):
    text: str


class ImagePart(Strict, frozen=True, tag_field="type", tag="image_url"):
    image_url: ImageURL


class VideoURL(Strict, frozen=True):
    url: str


class VideoPart(Strict, frozen=True, tag_field="type", tag="video_url"):
    """Not OpenAI's, but what servers of such models have in common."""

    video_url: VideoURL


class ChatMessage(Strict, frozen=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart | ImagePart | VideoPart] | None = None
    name: str | None = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None
    function_call: Any = None


class StreamOptions(Strict, frozen=True):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


Stop = Annotated[str, Meta(extra_json_schema={"minLength": 1})]
"""Checked with a message of its own."""


class ChatRequest(Strict, frozen=True):
    """``POST /v1/chat/completions``. ``parse`` is the only way to make one from outside."""

    model: str
    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    """Not OpenAI's. 0 and -1: all."""
    seed: Annotated[int, Meta(ge=-(1 << SEED_BITS), le=(1 << SEED_BITS) - 1)] | None = None
    n: Annotated[int, Meta(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    timeout: Annotated[float, Meta(gt=0)] | None = None
    """Not OpenAI's. Seconds after which the request ends by DeadlineExceeded."""
    ignore_eos: bool | None = None
    """Not OpenAI's. The answer goes on after the model's end token (for measurements)."""
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Any = None
    metadata: dict[str, str] | None = None

    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    logit_bias: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    service_tier: Any = None
    store: Any = None
    moderation: Any = None

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def n_choices(self) -> int:
        return self.n or 1

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def n_logprobs(self) -> int:
        """As ``Sampling.logprobs``."""
        return (self.top_logprobs or 0) if self.logprobs else -1

    def items(self) -> list[ItemInput]:
        """Images and videos in the order of the messages."""
        found: list[ItemInput] = []
        for i, message in enumerate(self.messages):
            for j, part in enumerate(message.content if isinstance(message.content, list) else ()):
                where = f"messages[{i}].content[{j}]"
                if isinstance(part, ImagePart):
                    detail: Detail = "low" if part.image_url.detail == "low" else "high"
                    found.append(
                        ItemInput("image", part.image_url.url, f"{where}.image_url", detail)
                    )
                elif isinstance(part, VideoPart):
                    found.append(ItemInput("video", part.video_url.url, f"{where}.video_url"))
        return found

    def texts(self) -> list[tuple[str, str]]:
        """(text, JSON path) of everything a client wrote into the prompt."""
        found: list[tuple[str, str]] = []
        for i, message in enumerate(self.messages):
            if isinstance(message.content, str):
                found.append((message.content, f"messages[{i}].content"))
            for j, part in enumerate(message.content if isinstance(message.content, list) else ()):
                if isinstance(part, TextPart):
                    found.append((part.text, f"messages[{i}].content[{j}].text"))
            if message.name is not None:
                found.append((message.name, f"messages[{i}].name"))
        return found

    def for_template(self) -> list[dict[str, Any]]:
        """The messages as chat templates know them; images and videos without their data."""
        return [_for_template(message) for message in self.messages]


@dataclass(frozen=True)
class ItemInput:
    kind: Kind
    url: str
    param: str
    """JSON path of the part that names it."""
    detail: Detail = "high"


def _for_template(message: ChatMessage) -> dict[str, Any]:
    content: Any = message.content or ""
    if isinstance(message.content, list):
        content = [
            {"type": "text", "text": part.text}
            if isinstance(part, TextPart)
            else {"type": "image" if isinstance(part, ImagePart) else "video"}
            for part in message.content
        ]
    named = {"name": message.name} if message.name is not None else {}
    return {"role": _ROLES.get(message.role, message.role), "content": content, **named}


# ------------------------------------------------------------------ reading a request

_decoder = msgspec.json.Decoder(ChatRequest)
_PATH = re.compile(r"^(?P<what>.*?)(?: - at `\$(?P<path>.*)`)?$", re.DOTALL)
_NAMED = re.compile(r"(?:unknown|missing required) field `([^`]*)`")


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "logit_bias": ({},),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "moderation": (),
}
"""OpenAI's fields that are not supported, with the values that ask for nothing."""
NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
}


def parse(body: bytes) -> ChatRequest:
    """Raises BadRequest naming the field at fault."""
    try:
        request = _decoder.decode(body)
    except msgspec.ValidationError as exc:
        raise _invalid(str(exc)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise BadRequest(f"the body is not JSON: {exc}") from None
    _refuse_unsupported(request, NEUTRAL, "")
    for index, message in enumerate(request.messages):
        where = f"messages[{index}]"
        _refuse_unsupported(message, NEUTRAL_IN_MESSAGE, f"{where}.")
        if message.content is None and message.role != "assistant":
            raise BadRequest(f"{where}.content is missing", param=f"{where}.content")
    _check_together(request)
    return request


def _check_together(request: ChatRequest) -> None:
    if any(not stop for stop in request.stops):
        raise BadRequest("a stop string must not be empty", param="stop")
    if request.top_logprobs is not None and not request.logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise BadRequest("stream_options needs stream to be true", param="stream_options")
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise BadRequest("max_tokens and max_completion_tokens disagree", param="max_tokens")


def _refuse_unsupported(struct: Strict, table: dict[str, tuple[Any, ...]], prefix: str) -> None:
    for name, neutral in table.items():
        value = getattr(struct, name)
        if value is None or any(value == one and type(value) is type(one) for one in neutral):
            continue
        shown = msgspec.json.encode(value)[:80].decode(errors="replace")
        raise BadRequest(f"{prefix}{name} = {shown} is not supported", param=prefix + name)


def _invalid(message: str) -> BadRequest:
    """From msgspec's words and JSON path to OpenAI's."""
    match = _PATH.match(message)
    assert match is not None, "the pattern matches everything"
    what, path = match["what"], (match["path"] or "").removeprefix(".")
    if named := _NAMED.search(what):
        path = f"{path}.{named[1]}" if path else named[1]
    if path.endswith("].type"):
        what += " (supported: text, image_url, video_url)"
    return BadRequest(f"{path}: {what}" if path else what, param=path or None)


# ------------------------------------------------------------------ errors


FaultType = Literal[
    "authentication_error", "invalid_request_error", "rate_limit_error", "server_error"
]


class Fault(msgspec.Struct, frozen=True):
    message: str
    type: FaultType
    param: str | None
    """Path of the field at fault."""
    code: str


class ErrorAnswer(msgspec.Struct, frozen=True):
    error: Fault


def error_body(error: TriptychError) -> dict[str, Any]:
    """An ``ErrorAnswer`` as JSON knows it."""
    kind: FaultType
    if isinstance(error, Unauthorized):
        kind = "authentication_error"
    elif isinstance(error, ClientError):
        kind = "invalid_request_error"
    else:
        kind = "rate_limit_error" if isinstance(error, Overloaded) else "server_error"
    fault = Fault(error.message, kind, error.param, error.code)
    return dict(msgspec.to_builtins(ErrorAnswer(fault)))
