"""Reading KV with several ranks: the leader's side.

The leader claims, validates and releases for its group, as any consumer does. What it reads, every
rank reads: the same pieces of the peer's rank of the same number, to the same offsets, since block
numbers are the group's. ``RankedTransport`` makes one link of the links of all ranks; those of the
followers are in their processes (``rank_links``), behind a pipe. What one rank could not read,
nobody has.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress

import msgspec

from triptych.capabilities import TransportOffer
from triptych.config import Timeouts
from triptych.errors import TransferFailed
from triptych.ranks import Pipe, PipeClosed
from triptych.transfer.mover import STUCK_QUARANTINE_S
from triptych.transfer.transports.base import Link, Peer, Read, Transport, TransportUnavailable

GRACE_S = 0.5
"""For an answer over the pipe, beyond the time that the work itself may take."""


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """From the leader to a follower's ``RankLinks``; answered by a ``Done`` of the same number."""

    number: int


class AskOffers(Task, frozen=True, tag="offers"):
    """How can this rank's pool be read?"""


class Connect(Task, frozen=True, tag="connect"):
    """Make a link, and see that it leads to the peer's process."""

    link: int
    """The leader's number for it."""
    offer: TransportOffer
    url: str
    session: str
    token: str
    """Of the peer, as in ``Peer``."""
    nonce: str
    """What must stand at the start of its pool."""


class ReadPieces(Task, frozen=True, tag="read"):
    link: int
    pieces: tuple[Read, ...]
    timeout_s: float


class Abort(Task, frozen=True, tag="abort"):
    """Never answered."""

    link: int


class Disconnect(Task, frozen=True, tag="disconnect"):
    link: int


class ReadPool(Task, frozen=True, tag="pool"):
    """Bytes of this rank's own pool, for a peer that only the leader's server can answer."""

    offset: int
    nbytes: int


AnyTask = AskOffers | Connect | ReadPieces | Abort | Disconnect | ReadPool


class Done(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    number: int = 0
    """Of the task."""
    failure: str = ""
    quarantine_s: float = 0.0
    """As in ``TransferFailed``, with ``failure``."""
    offers: tuple[TransportOffer, ...] = ()
    content: bytes = b""


_done = msgspec.msgpack.Decoder(Done)


def rank_nonce(nonce: str, rank: int) -> str:
    """What stands at the start of a rank's pool, of a group whose leader has ``nonce``."""
    return nonce if rank == 0 else f"{nonce}:{rank}"


class RemoteRank:
    """A follower, as its leader's transfer threads reach it. Any thread; owns nothing."""

    def __init__(self, rank: int, pipe: Pipe) -> None:
        self.rank = rank
        self._pipe = pipe
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Future[Done]] = {}
        self._closed = False
        self._lock = threading.Lock()
        threading.Thread(target=self._receive, name=f"rank-{rank}-answers", daemon=True).start()

    def begin(self, task: Callable[[int], Task]) -> Future[Done]:
        """Hand over a task; ``task`` makes it of its number. ``result`` waits for its end."""
        number, answer = next(self._numbers), Future[Done]()
        with self._lock:
            if self._closed:
                answer.set_exception(TransferFailed(f"rank {self.rank} is gone"))
                return answer
            self._waiting[number] = answer
        with suppress(PipeClosed):  # the receiving thread sees it too, and ends all waits
            self._pipe.send(task(number))
        return answer

    def result(self, answer: Future[Done], timeout_s: float) -> Done:
        """Raises TransferFailed: what the follower says of it, or that it says nothing."""
        try:
            done = answer.result(max(0.0, timeout_s))
        except FutureTimeout:
            raise TransferFailed(
                f"rank {self.rank} did not answer in time", quarantine_s=STUCK_QUARANTINE_S
            ) from None
        if done.failure:
            reason = f"rank {self.rank}: {done.failure}"
            raise TransferFailed(reason, quarantine_s=done.quarantine_s)
        return done

    def post(self, task: Task) -> None:
        """Hand over a task that nobody waits for."""
        with suppress(PipeClosed):
            self._pipe.send(task)

    def offers(self, timeout_s: float) -> tuple[TransportOffer, ...]:
        """How its pool can be read. Blocks. Raises TransferFailed."""
        return self.result(self.begin(AskOffers), timeout_s).offers

    def read_pool(self, offset: int, nbytes: int, timeout_s: float) -> bytes:
        """A copy of bytes of its pool. Blocks. Raises TransferFailed."""
        answer = self.begin(lambda number: ReadPool(number, offset, nbytes))
        return self.result(answer, timeout_s).content

    def _receive(self) -> None:
        while True:
            try:
                done = self._pipe.receive(_done)
            except PipeClosed as exc:
                gone = TransferFailed(f"rank {self.rank} is gone: {exc}")
                break
            with self._lock:
                answer = self._waiting.pop(done.number, None)
            if answer is not None:
                answer.set_result(done)
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            answer.set_exception(gone)


class RankedTransport:
    """``own``: this process's transport of the kind; the followers have theirs."""

    def __init__(self, own: Transport, others: Sequence[RemoteRank]) -> None:
        self._own = own
        self._others = others
        self._numbers = itertools.count(1)

    @property
    def kind(self) -> str:
        return self._own.kind

    def offer(self) -> TransportOffer:
        return self._own.offer()

    def connect(self, offer: TransportOffer, peer: Peer, timeouts: Timeouts) -> Link:
        """One link for all ranks; the leader's alone to a peer of one rank, such as an encoder."""
        theirs = {each.rank: each for each in peer.offers if each.kind == self.kind}
        own = self._own.connect(offer, peer, timeouts)
        if set(theirs) <= {0}:
            return own
        link = RankedLink(next(self._numbers), own, self._others)
        try:
            link.connect(theirs, peer, timeouts)
        except TransferFailed as exc:
            link.close()
            raise TransportUnavailable(exc.message) from exc
        return link

    def close(self) -> None:
        self._own.close()


class RankedLink:
    """The links of all ranks to one peer's ranks, as one. ``number``: the followers know it by."""

    memory = None
    """KV is not used in place."""

    def __init__(self, number: int, own: Link, others: Sequence[RemoteRank]) -> None:
        self._number = number
        self._own = own
        self._others = others

    def connect(self, offers: dict[int, TransportOffer], peer: Peer, timeouts: Timeouts) -> None:
        """Every follower to the peer's rank of its own number. Raises TransferFailed."""
        if sorted(offers) != list(range(len(self._others) + 1)):
            raise TransferFailed(
                f"the peer offers ranks {sorted(offers)}, this group has {len(self._others) + 1}"
            )
        answers = []
        for other in self._others:
            offer, nonce = offers[other.rank], rank_nonce(peer.nonce, other.rank)

            def task(number: int, offer: TransportOffer = offer, nonce: str = nonce) -> Task:
                return Connect(
                    number, self._number, offer, peer.url, peer.session, peer.token, nonce
                )

            answers.append((other, other.begin(task)))
        for other, answer in answers:
            other.result(answer, timeouts.transfer + GRACE_S)

    def read(self, pieces: Sequence[Read], timeout_s: float) -> None:
        """See ``Link``: all bytes of all pieces are at every rank."""
        deadline = time.monotonic() + timeout_s
        asked = tuple(pieces)
        answers = [
            (other, other.begin(lambda n: ReadPieces(n, self._number, asked, timeout_s)))
            for other in self._others
        ]
        failures = []
        try:
            self._own.read(pieces, timeout_s)
        except TransferFailed as exc:
            failures.append(exc)
        for other, answer in answers:  # also after a failure: nothing is to be on its way any more
            try:
                other.result(answer, deadline - time.monotonic() + GRACE_S)
            except TransferFailed as exc:
                failures.append(exc)
        if failures:
            raise max(failures, key=lambda failure: failure.quarantine_s)

    def abort(self) -> None:
        self._own.abort()
        for other in self._others:
            other.post(Abort(0, self._number))

    def close(self) -> None:
        self._own.close()
        for other in self._others:
            other.post(Disconnect(0, self._number))
