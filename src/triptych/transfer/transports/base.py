"""What a transport is: a way for a consumer to read a producer's region into its own.

Control and data are apart: claims, readiness and leases travel on channels; a transport only
moves bytes, one-sided, and knows nothing of slots.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from triptych.config import Timeouts
from triptych.errors import TransferFailed
from triptych.transfer.region import PROBE_NBYTES, BaseRegion, probe_page
from triptych.wire import TransportOffer

logger = logging.getLogger(__name__)


class TransportUnavailable(TransferFailed):
    """This transport cannot reach that peer."""


class Read(NamedTuple):
    """Bytes ``remote .. remote + nbytes`` of the peer's region, to ``local`` of ours."""

    remote: int
    local: int
    nbytes: int


@dataclass(frozen=True)
class Peer:
    """A producer, as its channel knows it."""

    url: str
    session: str
    token: str
    nonce: str = ""
    """Of its process."""
    offers: tuple[TransportOffer, ...] = ()
    """All of them, of all its ranks."""


class Link(Protocol):
    """Reads one producer's region. Used on that producer's transfer thread only, but for abort
    and ``memory``."""

    @property
    def memory(self) -> Tensor | None:
        """(bytes,) uint8: the peer's region itself, mapped here and never to be written; None
        where bytes must move, and after ``close``. Stays mapped while any view of it lives."""

    def read(self, pieces: Sequence[Read], timeout_s: float) -> None:
        """All bytes of all pieces are here when this returns. Blocks for at most ``timeout_s``.

        Raises TransferFailed; its ``quarantine_s`` says how long the destination may still be
        written to. A piece outside either region is refused before any byte moves.
        """

    def abort(self) -> None:
        """The peer is lost: a read that waits for it fails soon, later ones at once. From any
        thread, without waiting; a plain copy just ends."""

    def close(self) -> None:
        """Idempotent."""


class Transport(Protocol):
    """One per process and kind, for both sides: this process's region is read by its peers
    through ``offer`` and is the destination of what is read through ``connect``."""

    @property
    def kind(self) -> str: ...

    def offer(self) -> TransportOffer:
        """How peers can read this process's region. Raises TransportUnavailable."""

    def connect(self, offer: TransportOffer, peer: Peer, timeouts: Timeouts) -> Link:
        """Blocks (transfer thread). Raises TransportUnavailable."""

    def close(self) -> None:
        """Stop offering. Idempotent."""


@cache
def host_id() -> str:
    """Boot id of this host: equal means the same machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def check_bounds(pieces: Sequence[Read], remote_nbytes: int, region: BaseRegion) -> None:
    """Raises TransferFailed unless every piece lies inside both regions."""
    for piece in pieces:
        if piece.remote < 0 or piece.nbytes < 0 or piece.remote + piece.nbytes > remote_nbytes:
            raise TransferFailed(f"{piece} is outside the peer's {remote_nbytes} bytes")
        try:
            region.check(piece.local, piece.nbytes)
        except ValueError as exc:
            raise TransferFailed(str(exc)) from exc


def probe(link: Link, region: BaseRegion, nonce: str, timeout_s: float) -> None:
    """Read the start of the peer's probe page and see whether it is the process we talk to.

    A read that fails is tried once more: an engine may still hold a connection to a process that
    had this address before, and finds out only now. Raises TransferFailed.
    """
    cell = region.scratch()
    try:
        link.read([Read(0, cell, PROBE_NBYTES)], timeout_s)
    except TransferFailed as exc:
        logger.info("probing once more: %s", exc)
        cell = region.scratch()  # the first may still be written to
        link.read([Read(0, cell, PROBE_NBYTES)], timeout_s)
    if region.read(cell, PROBE_NBYTES) != probe_page(nonce)[:PROBE_NBYTES]:
        raise TransferFailed("the memory behind the offer is not that of the peer")
