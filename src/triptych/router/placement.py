"""Which worker does what. Pure: plain data in, plain data out."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from triptych.request import LOW_SIDE, Detail

BOUND = 1.25
"""An image goes to the encoder that its content prefers while it ends there no later than this
multiple of the earliest time that another could have it ready."""
PATCH_PIXELS = 14 * 14
"""Of a vision patch, more or less, in every family."""
PATCHES_OF_VIDEO_BYTE = 1 / 100
"""Two frames a second, two to a patch, are 1/60 of the bytes of 480p at 1 Mbit/s and 1/200 of those
of 1080p at 5 Mbit/s, whose frames Qwen's processor makes smaller."""
PREFIX_TOKENS = 128
"""Prompts are compared by blocks of so many tokens."""
ROLES_OF = {
    "E/P/D": ("prefill", "decode"),
    "E/PD": ("language",),
    "EPD": ("language",),
}
"""Roles that make the answer, by topology; encoders come before them."""
EITHER = (("language",), ("prefill", "decode"))
"""What may make the answer where no topology was asked for, the best first."""


@dataclass(frozen=True)
class Candidate:
    """A worker as placement sees it."""

    worker_id: str
    load: int
    """Outstanding patches of an encoder, outstanding tokens of any other role."""
    room: int = 0
    """Tokens that its KV cache holds in all; 0: none, or not said."""
    known: Container[str] = frozenset()
    """What it has had lately: contents of items at an encoder, prefixes of prompts elsewhere."""


@dataclass(frozen=True)
class Item:
    """An image or video as placement sees it."""

    content: str
    """Items of the same content are encoded once."""
    patches: int
    """What its forward costs, about."""


class Recent:
    """A set of bounded size: what was added the longest ago goes first. Adding again renews."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._keys: OrderedDict[str, None] = OrderedDict()

    def add(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self._most:
            self._keys.popitem(last=False)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)


# ------------------------------------------------------------------ encoders


def spread_items(items: Sequence[Item], encoders: Sequence[Candidate]) -> list[str]:
    """The encoder (``worker_id``) of each item. ``encoders`` must not be empty.

    An encoder would have an item ready when it has worked off what it has and the item itself,
    which costs nothing where it has been lately. The item goes where that is soonest, or to one
    that is at most ``BOUND`` times as late and is preferred: for having had it, then by its
    content, so that the same image finds its embedding again even if nobody remembers. The
    costliest are placed first, so that the request is ready as soon as it can be.
    """
    loads = {encoder.worker_id: encoder.load for encoder in encoders}
    known = {encoder.worker_id: encoder.known for encoder in encoders}
    placed: dict[str, str] = {}
    for item in sorted(items, key=lambda item: item.patches, reverse=True):
        if item.content in placed:
            continue  # the same image once more
        has = {worker_id: item.content in known[worker_id] for worker_id in loads}
        cost = {worker_id: 0 if has[worker_id] else item.patches for worker_id in loads}
        soonest = min(loads[worker_id] + cost[worker_id] for worker_id in loads)
        wanted = sorted(
            (w for w in loads if loads[w] + cost[w] <= BOUND * soonest),
            key=lambda w: (has[w], _affinity(item.content, w)),
        )
        chosen = wanted[-1]
        loads[chosen] += cost[chosen]
        placed[item.content] = chosen
    return [placed[item.content] for item in items]


def estimated_patches(nbytes: int, size: tuple[int, int] | None, detail: Detail = "high") -> int:
    """What an item's forward costs, by its header. ``size``: pixels of an image; None: a video,
    or unknown.

    The exact number is the encoder's to say, and it says so only once it has been chosen. Looking
    at a header costs microseconds; counting a video's frames would cost milliseconds, so of a
    video the bytes are taken.
    """
    if size is None:
        return max(1, round(nbytes * PATCHES_OF_VIDEO_BYTE))
    pixels = size[0] * size[1]
    if detail == "low":
        pixels = min(pixels, LOW_SIDE * LOW_SIDE)
    return max(1, pixels // PATCH_PIXELS)


def _affinity(content: str, worker_id: str) -> bytes:
    """Rendezvous hashing: a worker that comes or goes moves only its own images."""
    return hashlib.blake2b(f"{content}|{worker_id}".encode(), digest_size=8).digest()


# ------------------------------------------------------------------ the answer


def place_prompt(
    n_prompt: int, n_kept: int, prefixes: Sequence[str], candidates: Sequence[Candidate]
) -> str:
    """Who computes a prompt: the one that would be through with it first.

    That counts the tokens outstanding there and those of the prompt that it has not had lately,
    as an earlier turn of the same chat. Those with room in their KV cache come before those
    without. ``n_kept``: tokens whose KV it holds for the request, the answer's too if it decodes.
    """

    def order(candidate: Candidate) -> tuple[bool, int, str]:
        full = bool(candidate.room) and candidate.load + n_kept > candidate.room
        left = n_prompt - PREFIX_TOKENS * _known_prefix(prefixes, candidate.known)
        return full, candidate.load + left, candidate.worker_id

    return min(candidates, key=order).worker_id


def place_decode(candidates: Sequence[Candidate]) -> str:
    """Who decodes: the one with the most tokens of its KV cache free."""
    return min(candidates, key=lambda c: (c.load - c.room, c.worker_id)).worker_id


def excess(n_kept: int, candidate: Candidate, backlog: float) -> float:
    """Tokens by which a worker would have more outstanding than ``backlog`` times its KV cache.

    0 or less: it may be given so many. One that has nothing to do may be given anything.
    """
    if not candidate.room or not candidate.load:
        return 0
    return candidate.load + n_kept - backlog * candidate.room


def _known_prefix(prefixes: Sequence[str], known: Container[str]) -> int:
    """How many of the prefixes a worker has had: the longest says it, however many were dropped."""
    return next((n for n in range(len(prefixes), 0, -1) if prefixes[n - 1] in known), 0)


# ------------------------------------------------------------------ roles


def prefer(known: Sequence[str], avoided: Collection[str]) -> list[str]:
    """``known`` without those that failed this request already, unless that leaves nobody."""
    return [worker_id for worker_id in known if worker_id not in avoided] or list(known)


def answering_roles(topology: str, present: Collection[str]) -> tuple[str, ...]:
    """Roles that make the answer; without a topology, those that ``present`` workers can fill."""
    if topology in ROLES_OF:
        return ROLES_OF[topology]

    def fitness(roles: tuple[str, ...]) -> tuple[bool, int]:
        found = sum(role in present for role in roles)
        return found == len(roles), found

    return max(EITHER, key=fitness)


def shortfall(topology: str, asked: Mapping[str, int], present: Mapping[str, int]) -> list[str]:
    """Workers that a topology lacks to be in effect: [] when it is.

    ``asked`` and ``present``: number of workers by role.
    """
    lacking = []
    for role in ("encoder", *answering_roles(topology, present)):
        if not present.get(role):
            lacking.append(role)
        elif present[role] < asked[role]:
            lacking.append(f"{asked[role] - present[role]} more of role {role}")
    return lacking


def apart(
    consumers: Iterable[tuple[str, Sequence[str]]], producers: Iterable[tuple[str, Sequence[str]]]
) -> list[str]:
    """Pairs of workers between which nothing could be read. Each: its id and its transports."""
    makers = list(producers)
    return [
        f"{reader} reads by {' and '.join(ways)}, {maker} offers {' and '.join(offered)}"
        for reader, ways in consumers
        for maker, offered in makers
        if not set(ways) & set(offered)
    ]
