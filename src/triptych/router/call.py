"""One request of a client, as the router's parts hand it to each other."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from triptych.errors import TriptychError
from triptych.request import Sampling
from triptych.router.openai import ChatRequest, ImageInput


@dataclass(frozen=True)
class Picture:
    """An image's raw bytes."""

    data: bytes
    digest: str
    """SHA-256, hex."""


@dataclass
class Call:
    """One request of a client."""

    request_id: str
    chat: ChatRequest
    arrived: float
    """Wall clock, seconds since the epoch."""
    images: list[ImageInput] = field(init=False)
    tries: int = 0
    failures: int = 0
    """Tries that have failed since the answer last went on."""
    avoided: set[str] = field(default_factory=set)
    """Workers that failed this request."""
    sampling: Sampling | None = None
    """As the first try had it: later ones must choose the same tokens."""
    tokens: list[int] = field(default_factory=list)
    """Of the answer, in order, as the client has had them."""

    def __post_init__(self) -> None:
        self.images = self.chat.images()

    def located(self, error: TriptychError) -> TriptychError:
        """``error`` naming the image it is about, by number and by JSON path."""
        if error.item is None or not 0 <= error.item < len(self.images):
            return error
        name = f"image {error.item + 1}"
        message = error.message if error.message.startswith(name) else f"{name}: {error.message}"
        found = copy.copy(error)
        found.args, found.message = (message,), message
        found.param = error.param or self.images[error.item].param
        return found


@dataclass(frozen=True)
class Prompt:
    token_ids: tuple[int, ...]
    sampling: Sampling
    resumed: tuple[int, ...] = ()
    """The answer's tokens so far, when another try goes on with it."""

    @property
    def n_left(self) -> int:
        """Most tokens that are still to come."""
        return self.sampling.max_tokens - len(self.resumed)
