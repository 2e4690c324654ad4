"""The consumer's side of the transfer plane: claims refs and reads them into this process."""

from __future__ import annotations

import asyncio
import copy
import inspect
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from triptych import wire
from triptych.config import Timeouts
from triptych.errors import ConfigError, DeadlineExceeded, TransferFailed, WorkerLost
from triptych.observe.metrics import transport_links
from triptych.refs import AnyRef, EmbeddingRef
from triptych.states import PullEvent, PullState
from triptych.transfer.channel import Channel, OnLost, OnMessage
from triptych.transfer.mover import Mover
from triptych.transfer.pull import Copy, Loan, Pull
from triptych.transfer.region import BaseRegion
from triptych.transfer.transports.base import Link, Peer, Read, Transport, probe

logger = logging.getLogger(__name__)

Dialer = Callable[[str, OnMessage, OnLost], Awaitable[Channel]]
"""Opens a channel to a base URL: ``handshake.dial`` with this process's part filled in."""
Place = Callable[[int, Sequence[wire.Piece]], "Sequence[int] | Awaitable[Sequence[int]]"]
"""(index of the first piece, pieces) -> offset in our region for each. May wait for memory."""
Landed = Callable[[int, int, wire.Ready], None]
"""(first, count, message): these pieces are here and were valid when they were read."""


@dataclass(frozen=True)
class Pulled:
    """What a pull moved."""

    transport: str
    nbytes: int
    read_s: float
    """Seconds of reading alone, without waiting for the producer."""


@dataclass
class _Producer:
    """A producer this process reads from."""

    url: str
    channel: Channel
    kind: str
    link: Link
    mover: Mover
    pulls: dict[int, Pull] = field(default_factory=dict)

    def forget(self, claim: int) -> None:
        self.pulls.pop(claim, None)


class Consumer:
    """Pulls refs. Used from the event loop's thread; owns one channel and one transfer thread per
    producer, both made when its first ref comes.

    ``transports``: those that may be used, by kind (``transports.open_transports``).
    """

    def __init__(
        self, dialer: Dialer, region: BaseRegion, transports: Mapping[str, Transport],
        timeouts: Timeouts,
    ) -> None:  # fmt: skip
        if timeouts.lease <= timeouts.transfer:
            raise ConfigError(
                f"the lease ({timeouts.lease:g} s) must outlive a transfer "
                f"({timeouts.transfer:g} s)"
            )
        self._dialer = dialer
        self._region = region
        self._transports = transports
        self._timeouts = timeouts
        self._producers: dict[str, asyncio.Task[_Producer]] = {}
        self._by_session: dict[str, _Producer] = {}
        self._claims = itertools.count(1)
        self._closed = False

    async def pull(
        self, ref: AnyRef, request_id: str, place: Place, landed: Landed, timeout_s: float
    ) -> Pulled:
        """Claim ``ref`` and read it, piece by piece as the producer makes them ready.

        Raises the error that the producer named (Cancelled, BadMedia, ...), TransferFailed (its
        ``quarantine_s`` holds for every destination that ``place`` gave and ``landed`` did not
        confirm), WorkerLost, PeerRefused, or DeadlineExceeded after ``timeout_s``. When the
        caller is cancelled the lease is released; CancelledError comes once no destination can
        be written to any more.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        producer = await self._producer(ref.owner, deadline)
        pull = self._claim(producer, ref, request_id)
        try:
            while pull.state is not PullState.DONE:
                await pull.until(lambda: bool(pull.ready), deadline, "pieces")
                ready = pull.ready.popleft()
                pull.check(ready)
                if ready.pieces:
                    await self._land(producer, pull, ready, place, deadline)
                landed(ready.first, len(ready.pieces), ready)
                if ready.last:
                    pull.step(PullEvent.LAST)
        except TransferFailed as exc:
            if exc.quarantine_s:
                pull.step(PullEvent.UNSAFE)
            raise
        finally:
            if pull.state not in (PullState.DONE, PullState.QUARANTINED):
                pull.step(PullEvent.FAIL)
            del producer.pulls[pull.claim]
            producer.channel.send(wire.Release(pull.claim))
        return Pulled(producer.kind, pull.nbytes, pull.read_s)

    async def opens_in_place(self, owner: str, timeout_s: float) -> bool:
        """Can embeddings of the producer at ``owner`` be borrowed? Opens the channel if need be.

        Raises what ``pull`` raises for a producer that cannot be reached.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        return (await self._producer(owner, deadline)).link.memory is not None

    def in_place(self, owner: str) -> bool:
        """The same without waiting: False also when no channel to it is open yet."""
        task = self._producers.get(owner)
        if task is None or not task.done() or task.cancelled() or task.exception() is not None:
            return False
        return task.result().link.memory is not None

    async def borrow(self, ref: EmbeddingRef, request_id: str, timeout_s: float) -> Loan:
        """Claim ``ref``, wait until it is ready, and use it where it is: nothing is copied.

        Raises as ``pull``, and TransferFailed when this producer's memory cannot be used in place.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        producer = await self._producer(ref.owner, deadline)
        pull = self._claim(producer, ref, request_id)
        try:
            piece = await _whole(pull, deadline)
            memory = producer.link.memory
            if memory is None:
                raise TransferFailed(f"the memory of {ref.owner} cannot be used in place")
            if piece.offset < 0 or piece.offset + piece.nbytes > len(memory):
                raise TransferFailed(f"{piece} is outside the peer's {len(memory)} bytes")
            pull.step(PullEvent.MAP)
        finally:
            if pull.state is not PullState.IN_PLACE:
                pull.step(PullEvent.FAIL)
                producer.pulls.pop(pull.claim, None)
                producer.channel.send(wire.Release(pull.claim))
        return Loan(
            pull,
            memory[piece.offset : piece.offset + piece.nbytes],
            producer.kind,
            producer.channel.send,
            producer.forget,
            self._timeouts.rpc,
        )

    async def fetch(
        self, ref: EmbeddingRef, request_id: str, offset: int, timeout_s: float
    ) -> Copy:
        """Claim ``ref``, wait until it is ready, and read it to ``offset`` of our region. Whether
        it was valid when it was read is asked, but not waited for.

        Raises as ``pull``, which waits.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        producer = await self._producer(ref.owner, deadline)
        pull = self._claim(producer, ref, request_id)
        try:
            piece = await _whole(pull, deadline)
            reads = [Read(piece.offset, offset, piece.nbytes)]
            answer_by = await self._read(producer, pull, reads, deadline)
        except TransferFailed as exc:
            if exc.quarantine_s:
                pull.step(PullEvent.UNSAFE)
            raise
        finally:
            if pull.state is not PullState.VALIDATING:
                if pull.state is not PullState.QUARANTINED:
                    pull.step(PullEvent.FAIL)
                producer.forget(pull.claim)
                producer.channel.send(wire.Release(pull.claim))
        send, forget = producer.channel.send, producer.forget
        return Copy(pull, producer.kind, send, forget, answer_by)

    async def decline(self, ref: AnyRef, request_id: str, timeout_s: float) -> None:
        """The request does not need what ``ref`` names: take its lease over and let it end.

        Raises what ``pull`` raises for a producer that cannot be reached.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        producer = await self._producer(ref.owner, deadline)
        pull = self._claim(producer, ref, request_id)
        pull.step(PullEvent.FAIL)
        producer.forget(pull.claim)
        producer.channel.send(wire.Release(pull.claim))

    async def close(self) -> None:
        """End all channels; pulls in progress raise WorkerLost."""
        self._closed = True
        tasks, self._producers = list(self._producers.values()), {}
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        known = [result for result in results if isinstance(result, _Producer)]
        await asyncio.gather(*(producer.channel.close() for producer in known))

    # ------------------------------------------------------------------ one pull

    def _claim(self, producer: _Producer, ref: AnyRef, request_id: str) -> Pull:
        """Raises WorkerLost when the channel has ended."""
        if not producer.channel.is_open:
            raise WorkerLost(f"{ref.owner}: its channel has ended")
        pull = Pull(next(self._claims), ref)
        producer.pulls[pull.claim] = pull
        producer.channel.send(wire.Claim(pull.claim, ref, request_id))
        return pull

    async def _land(
        self, producer: _Producer, pull: Pull, ready: wire.Ready, place: Place, deadline: float
    ) -> None:
        """Read the pieces of one message and have the read validated."""
        offsets = place(ready.first, ready.pieces)
        if inspect.isawaitable(offsets):
            offsets = await offsets
        reads = [
            Read(piece.offset, offset, piece.nbytes)
            for piece, offset in zip(ready.pieces, offsets, strict=True)
        ]
        answer_by = await self._read(producer, pull, reads, deadline)
        count = len(ready.pieces)
        producer.channel.send(wire.Validate(pull.claim, ready.first, count))
        await pull.until(lambda: bool(pull.valid), answer_by, "validation")
        answer = pull.valid.popleft()
        if answer != wire.Valid(pull.claim, ready.first, count):
            raise TransferFailed(f"asked about pieces {ready.first}+{count}, got {answer}")
        pull.step(PullEvent.VALID)
        pull.count += count
        pull.nbytes += sum(piece.nbytes for piece in ready.pieces)

    async def _read(
        self, producer: _Producer, pull: Pull, reads: Sequence[Read], deadline: float
    ) -> float:
        """Until when the producer may take to say that it was valid (of the loop's clock)."""
        loop = asyncio.get_running_loop()
        timeout_s = min(self._timeouts.transfer, deadline - loop.time())
        pull.step(PullEvent.READY)
        pull.read_s += await producer.mover.run(partial(_read, producer.link, reads), timeout_s)
        pull.step(PullEvent.READ)
        return min(deadline, loop.time() + self._timeouts.rpc)

    # ------------------------------------------------------------------ producers

    async def _producer(self, url: str, deadline: float) -> _Producer:
        """The producer behind a ref's URL; the first to ask dials, the others wait for it."""
        if self._closed:
            raise WorkerLost("this consumer is closed")
        task = self._producers.get(url)
        if task is None:
            task = self._producers[url] = asyncio.create_task(self._open(url))
            task.add_done_callback(partial(self._opened, url))
        await asyncio.wait({task}, timeout=deadline - asyncio.get_running_loop().time())
        if not task.done():
            raise DeadlineExceeded(f"opening a channel to {url}")
        if task.cancelled():
            raise WorkerLost(f"{url}: closing")
        if (error := task.exception()) is not None:
            # Each who waited gets its own: they write into it which item it is about.
            raise copy.copy(error) from error
        return task.result()

    def _opened(self, url: str, task: asyncio.Task[_Producer]) -> None:
        """A failed attempt is forgotten, so that the next ref tries again."""
        if (task.cancelled() or task.exception() is not None) and self._producers.get(url) is task:
            del self._producers[url]

    async def _open(self, url: str) -> _Producer:
        channel = await self._dialer(url, self._on_message, self._on_lost)
        mover = Mover()
        links: list[Link] = []
        linked = False
        try:
            kind = await self._link(url, channel, mover, links)
            linked = channel.is_open
        finally:
            for link in links[:-1] if linked else links:
                mover.post(link.close)
            if not linked:
                mover.close()
                await channel.close()
        if not linked:
            raise WorkerLost(f"{url}: lost while its memory was being probed")
        assert isinstance(channel.peer, wire.Welcome)
        producer = _Producer(url, channel, kind, links[-1], mover)
        self._by_session[channel.session] = producer
        transport_links.labels(kind, channel.peer.role).inc()
        return producer

    async def _link(self, url: str, channel: Channel, mover: Mover, links: list[Link]) -> str:
        """The first of our transports that the peer offers and whose probe succeeds.

        Every link that was made, the good one last, is appended to ``links``.
        """
        assert isinstance(channel.peer, wire.Welcome)
        welcome = channel.peer
        offers = {offer.kind: offer for offer in welcome.offers if offer.rank == 0}
        peer = Peer(url, channel.session, channel.token, welcome.process, welcome.offers)
        reasons = []
        for kind, transport in self._transports.items():
            if kind not in offers:
                reasons.append(f"{kind}: not offered")
                continue
            connect = partial(transport.connect, offers[kind], peer, self._timeouts)
            job = partial(self._probe, connect, channel.peer.process, links)
            try:
                await mover.run(job, self._timeouts.transfer)
            except TransferFailed as exc:
                reasons.append(f"{kind}: {exc.message}")
                continue
            others = f" ({'; '.join(reasons)})" if reasons else ""
            logger.info("reading from %s at %s by %s%s", channel.peer.role, url, kind, others)
            return kind
        raise TransferFailed(f"no transport to {url}: {'; '.join(reasons)}")

    def _probe(
        self, connect: Callable[[], Link], nonce: str, links: list[Link], left: float
    ) -> None:
        """On the transfer thread."""
        links.append(connect())
        probe(links[-1], self._region, nonce, left)

    # ------------------------------------------------------------------ channels

    def _on_message(self, channel: Channel, message: wire.ChannelMessage) -> None:
        producer = self._by_session.get(channel.session)
        if producer is None:
            return
        match message:
            case wire.Ready() | wire.Valid() | wire.Denied() | wire.Expired():
                # One that has ended here may still be spoken of.
                if (pull := producer.pulls.get(message.claim)) is not None:
                    pull.take(message)

    def _on_lost(self, channel: Channel, reason: str) -> None:
        producer = self._by_session.pop(channel.session, None)
        if producer is None:
            return
        task = self._producers.get(producer.url)
        if task is not None and task.done() and task.result() is producer:
            del self._producers[producer.url]
        for pull in producer.pulls.values():
            pull.error = WorkerLost(f"{producer.url}: {reason}")
            pull.changed.set()
        producer.link.abort()
        producer.mover.post(producer.link.close)
        producer.mover.close()
        assert isinstance(channel.peer, wire.Welcome)
        transport_links.labels(producer.kind, channel.peer.role).dec()


async def _whole(pull: Pull, deadline: float) -> wire.Piece:
    """Where an embedding is, once it is ready. Raises TransferFailed if it is not in one piece."""
    await pull.until(lambda: bool(pull.ready), deadline, "the embedding")
    ready = pull.ready.popleft()
    pull.check(ready)
    if not ready.last or len(ready.pieces) != 1:
        raise TransferFailed(f"slot {pull.ref.slot} came in {len(ready.pieces)} pieces")
    return ready.pieces[0]


def _read(link: Link, reads: Sequence[Read], left: float) -> float:
    """Seconds it took. On the transfer thread."""
    start = time.perf_counter()
    link.read(reads, left)
    return time.perf_counter() - start
