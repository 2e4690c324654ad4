"""Reading KV with several ranks: a follower's side (see ``ranked``)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from triptych.config import Timeouts
from triptych.errors import TransferFailed
from triptych.ranks import Pipe, PipeClosed
from triptych.transfer.mover import STUCK_QUARANTINE_S
from triptych.transfer.ranked import (
    Abort,
    AnyTask,
    AskOffers,
    Connect,
    Disconnect,
    Done,
    ReadPieces,
    ReadPool,
)
from triptych.transfer.region import BaseRegion
from triptych.transfer.transports.base import Link, Peer, Transport, probe

logger = logging.getLogger(__name__)


@dataclass
class _Line:
    """A link and the one thread that uses it."""

    thread: ThreadPoolExecutor
    link: Link | None = None
    """None: not made yet, or it could not be."""

    def read(self, task: ReadPieces) -> Done:
        if self.link is None:
            raise TransferFailed("there is no link")
        self.link.read(task.pieces, task.timeout_s)
        return Done()

    def abort(self) -> None:
        if self.link is not None:
            self.link.abort()

    def close(self) -> Done:
        if self.link is not None:
            self.link.close()
        return Done()


class RankLinks:
    """Does what the leader asks with this rank's pool. ``handle`` never waits: every link has a
    thread of its own, as at a consumer, and the pool has one."""

    def __init__(
        self,
        rank: int,
        region: BaseRegion,
        transports: Mapping[str, Transport],
        timeouts: Timeouts,
        pipe: Pipe,
    ) -> None:
        self._rank = rank
        self._region = region
        self._transports = transports
        self._timeouts = timeouts
        self._pipe = pipe
        self._lines: dict[int, _Line] = {}
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pool")

    def handle(self, task: AnyTask) -> None:
        """Tasks of one link in order; an abort overtakes them."""
        match task:
            case AskOffers():
                self._run(self._pool, task, self._offers)
            case ReadPool():
                self._run(self._pool, task, lambda: self._read_pool(task))
            case Connect():
                line = self._lines[task.link] = _Line(ThreadPoolExecutor(max_workers=1))
                self._run(line.thread, task, lambda: self._connect(line, task))
            case ReadPieces():
                line = self._lines[task.link]
                self._run(line.thread, task, lambda: line.read(task))
            case Abort() if task.link in self._lines:
                self._lines[task.link].abort()
            case Disconnect() if task.link in self._lines:
                line = self._lines.pop(task.link)
                self._run(line.thread, task, line.close)
                line.thread.shutdown(wait=False)

    def close(self) -> None:
        """End all reads, and stop offering."""
        for line in self._lines.values():
            line.abort()
            line.thread.submit(line.close)
            line.thread.shutdown()
        self._pool.shutdown()
        for transport in self._transports.values():
            transport.close()

    def _run(self, thread: ThreadPoolExecutor, task: AnyTask, work: Callable[[], Done]) -> None:
        def answer() -> None:
            try:
                done = work()
            except TransferFailed as exc:
                done = Done(failure=exc.message, quarantine_s=exc.quarantine_s)
            except Exception as exc:  # a thread's boundary: the leader waits for an answer
                logger.exception("%s failed", type(task).__name__)
                done = Done(failure=str(exc), quarantine_s=STUCK_QUARANTINE_S)
            with suppress(PipeClosed):  # then this process ends
                self._pipe.send(msgspec.structs.replace(done, number=task.number))

        thread.submit(answer)

    def _offers(self) -> Done:
        offers = (transport.offer() for transport in self._transports.values())
        return Done(offers=tuple(msgspec.structs.replace(o, rank=self._rank) for o in offers))

    def _read_pool(self, task: ReadPool) -> Done:
        return Done(content=self._region.read(task.offset, task.nbytes))

    def _connect(self, line: _Line, task: Connect) -> Done:
        transport = self._transports.get(task.offer.kind)
        if transport is None:
            raise TransferFailed(f"{task.offer.kind} cannot be had here")
        peer = Peer(task.url, task.session, task.token)
        line.link = transport.connect(task.offer, peer, self._timeouts)
        probe(line.link, self._region, task.nonce, self._timeouts.transfer)
        return Done()
