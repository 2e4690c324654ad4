"""Which worker does what. Pure: plain data in, plain data out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

BOUND = 1.25
"""No encoder takes more than this multiple of the mean load for the sake of its cache."""
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
    """Outstanding images of an encoder, outstanding tokens of any other role."""


def spread_items(digests: Sequence[str], encoders: Sequence[Candidate]) -> list[str]:
    """The encoder (``worker_id``) of each image.

    An image goes to the encoder that its content prefers, so that the same image finds its
    embedding again, unless that encoder already has more than its share of all outstanding
    images; then to the one it prefers next. ``encoders`` must not be empty.
    """
    loads = {encoder.worker_id: encoder.load for encoder in encoders}
    placed: list[str] = []
    for digest in digests:
        most = math.ceil(BOUND * (sum(loads.values()) + 1) / len(loads))
        wanted = sorted(loads, key=lambda worker_id: _affinity(digest, worker_id), reverse=True)
        chosen = next(worker_id for worker_id in wanted if loads[worker_id] < most)
        loads[chosen] += 1
        placed.append(chosen)
    return placed


def least_loaded(candidates: Sequence[Candidate]) -> str:
    """The worker with the least outstanding work; equal ones in a fixed order."""
    return min(candidates, key=lambda candidate: (candidate.load, candidate.worker_id)).worker_id


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


def missing_roles(topology: str, present: Collection[str]) -> list[str]:
    """What keeps a topology from being in effect: [] when it is."""
    wanted = ("encoder", *answering_roles(topology, present))
    return [role for role in wanted if role not in present]


def _affinity(digest: str, worker_id: str) -> bytes:
    """Rendezvous hashing: a worker that comes or goes moves only its own images."""
    return hashlib.blake2b(f"{digest}|{worker_id}".encode(), digest_size=8).digest()
