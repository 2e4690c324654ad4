"""One request of a client, as the router's parts hand it to each other."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from triptych.errors import BadMedia, BadVideo, TriptychError
from triptych.request import KINDS, Detail, Kind, Sampling
from triptych.router.admission import Place
from triptych.router.body import Inline
from triptych.router.openai import SEED_BITS, ChatRequest, ItemInput


@dataclass
class File:
    """An item's raw bytes."""

    kind: Kind
    data: bytes | None
    """None once the first token has come."""
    digest: str
    """SHA-256, hex."""
    patches: int
    """What its forward costs, about."""
    detail: Detail = "high"

    @property
    def content(self) -> str:
        """What is encoded, as placement compares it."""
        return f"{self.digest} {self.detail}"


def counted(files: Sequence[File]) -> str:
    """How many there are of each kind, as in "3 images, 1 videos"."""
    kinds = [file.kind for file in files]
    return ", ".join(f"{kinds.count(kind)} {kind}s" for kind in KINDS if kind in kinds)


@dataclass
class Call:
    """One request of a client; with ``branch``, one of the answers to it."""

    request_id: str
    chat: ChatRequest
    arrived: float
    """Wall clock, seconds since the epoch."""
    timeout_s: float
    """For all of it, from here on."""
    place: Place
    """Of the router's memory."""
    choice: int = 0
    """Which of the ``n`` answers this is."""
    inline: Mapping[str, Inline] = field(default_factory=dict)
    """Files that came in the request's body, by the URL of their item."""
    seed: int = field(init=False)
    """Drawn here when none is given; the answers draw from it by their numbers."""
    items: list[ItemInput] = field(init=False)
    """Images and videos, in the order of the prompt once that is known."""
    tries: int = 0
    failures: int = 0
    """Tries that have failed since the answer last went on."""
    let_go: int = 0
    """Tries since then that missed an embedding which its encoder had let go."""
    placed: bool = False
    """Workers for its prompt were found: it is not refused for others that came after it."""
    patient: bool = False
    """An encoder had no room at once: from now on the request waits in line."""
    evenly: bool = False
    """An encoder's pool cannot hold what it was to encode: from now on all encoders have as much of
    the request, whatever else they have to do."""
    avoided: set[str] = field(default_factory=set)
    """Workers that failed this request."""
    sampling: Sampling | None = None
    """As the first try had it: later ones must choose the same tokens."""
    tokens: list[int] = field(default_factory=list)
    """Of the answer, in order, as the client has had them."""

    def __post_init__(self) -> None:
        self.items = self.chat.items()
        seed = self.chat.seed
        self.seed = secrets.randbits(SEED_BITS) if seed is None else seed % (1 << SEED_BITS)

    def branch(self, choice: int) -> Call:
        """The same request for another of its answers, which has failures and tokens of its own.

        Made before anything has been tried.
        """
        other = copy.copy(self)
        other.choice, other.avoided, other.tokens = choice, set(), []
        other.placed = choice > 0
        return other

    def next_wire_id(self) -> str:
        """Of the next try: no two tries of any of the answers have the same."""
        self.tries += 1
        answer = f".{self.choice}" if self.choice else ""
        again = f"-{self.tries}" if self.tries > 1 else ""
        return f"{self.request_id}{answer}{again}"

    def first_sampling(self, max_tokens: int, stop_ids: tuple[int, ...]) -> Sampling:
        """``stop_ids``: of the model."""
        chat = self.chat
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if chat.temperature is None else chat.temperature,
            top_p=1.0 if chat.top_p is None else chat.top_p,
            top_k=max(0, chat.top_k or 0),
            seed=self.seed,
            choice=self.choice,
            stop_ids=() if chat.ignore_eos else stop_ids,
            logprobs=chat.n_logprobs,
        )

    def count(self, kind: Kind) -> int:
        return sum(item.kind == kind for item in self.items)

    def arrange(self, kinds: Sequence[Kind]) -> None:
        """Bring ``items`` into this order of kinds; of each kind they keep theirs."""
        left = {kind: iter([i for i in self.items if i.kind == kind]) for kind in set(kinds)}
        self.items = [next(left[kind]) for kind in kinds]

    def located(self, error: TriptychError) -> TriptychError:
        """``error`` naming the item it is about, by number among its kind and by JSON path."""
        if error.item is None or not 0 <= error.item < len(self.items):
            return error
        item = self.items[error.item]
        number = sum(other.kind == item.kind for other in self.items[: error.item + 1])
        name = f"{item.kind} {number}"
        message = error.message if error.message.startswith(name) else f"{name}: {error.message}"
        found = copy.copy(error)
        if type(error) is BadMedia and item.kind == "video":
            found = BadVideo(message, item=error.item)
        found.args, found.message = (message,), message
        found.param = error.param or item.param
        return found


@dataclass(frozen=True)
class Prompt:
    token_ids: tuple[int, ...]
    sampling: Sampling
    resumed: tuple[int, ...] = ()
    """The answer's tokens so far, when another try goes on with it."""
    prefixes: tuple[str, ...] = ()
    """Names of its beginnings, as ``prefixes.prefixes`` has them."""

    @property
    def n_tokens(self) -> int:
        """That prefill computes."""
        return len(self.token_ids) + len(self.resumed)

    @property
    def n_left(self) -> int:
        """Most tokens that are still to come."""
        return self.sampling.max_tokens - len(self.resumed)
