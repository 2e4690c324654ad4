"""What a request is made of, as every role sees it. No torch, no sockets."""

from __future__ import annotations

from typing import Literal

import msgspec

Kind = Literal["image", "video"]
"""Of an item: what a request has besides text."""
KINDS: tuple[Kind, ...] = ("image", "video")
Detail = Literal["high", "low"]
"""How large a model sees an image: as its processor makes it, or within ``LOW_SIDE``."""
LOW_SIDE = 512
"""Pixels: an image of low detail has at most the area of such a square."""


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the answer is chosen. A draw depends on (seed, choice, position) and on nothing else."""

    max_tokens: int
    """Most tokens of the answer, the first one included."""
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means all."""
    seed: int = 0
    choice: int = 0
    """Index of this answer among the request's ``n``."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the answer; the id itself is reported with ``finish="stop"``."""
    logprobs: int = -1
    """-1: none. 0: of the chosen token. k > 0: also of the k likeliest tokens."""


class ItemMeta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the prompt and the consumer need to know of one item before its pixels are encoded."""

    key: str
    """Content key (hex): kind, raw bytes, processor settings and backend, model, dtype, context."""
    text: str
    """The expanded placeholder that replaces the item's marker in the rendered prompt."""
    rows: int
    """Embedding rows: how often the token of a row occurs in ``text`` once tokenized."""
    grid: tuple[int, int, int] | None
    """(t, h, w) in patches for models with M-RoPE, else None."""
    planes: int
    """1 + DeepStack planes."""
    width: int
    """Hidden size of the language model."""
    dtype: str
    """"float32" | "bfloat16" | "float16"."""
    kind: Kind = "image"
    second_per_grid: float | None = None
    """Seconds between two steps of a video's ``t``, for models whose positions count time."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.planes, self.rows, self.width)

    @property
    def nbytes(self) -> int:
        return self.planes * self.rows * self.width * ITEM_SIZE[self.dtype]


ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one element by dtype name."""


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    token: int
    logprob: float


class TokenEvent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One generated token. ``index`` counts the answer's tokens from 0 whoever produced them."""

    request_id: str
    index: int
    token: int
    finish: str = ""
    """"" while the answer goes on, else "stop" or "length"."""
    logprob: float | None = None
    top: tuple[TopLogprob, ...] = ()


class Span(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing that happened to a request. Times are wall-clock seconds since the epoch."""

    name: str
    """queue, decode, preprocess, encode, ready, read, prefill, first_token, kv_read, ..."""
    start: float
    end: float
    role: str = ""
    pid: int = 0
    item: int = -1
    """Item index in the request; -1 when the span is about the request."""
    nbytes: int = 0
    transport: str = ""
    note: str = ""
