"""KV of a group of ranks is read by a group of ranks: each from its own, under one claim."""

from __future__ import annotations

import asyncio
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from functools import partial

import aiohttp
import msgspec
import pytest

from tests.transfer_rig import FAST, Puller, Worker
from triptych import wire
from triptych.capabilities import TransportOffer
from triptych.config import Timeouts, TransportName
from triptych.errors import TransferFailed
from triptych.ranks import Pipe, PipeClosed
from triptych.refs import KVRef
from triptych.transfer.consumer import Consumer
from triptych.transfer.mover import STUCK_QUARANTINE_S
from triptych.transfer.rank_links import RankLinks
from triptych.transfer.ranked import AnyTask, RankedLink, RankedTransport, RemoteRank, rank_nonce
from triptych.transfer.region import PAGE, Region
from triptych.transfer.transports.base import Link, Peer, Read, Transport, TransportUnavailable
from triptych.transfer.transports.choice import open_transports
from triptych.transfer.transports.http import transfer_route

AREA = 1 << 20
BLOCK = 4096
_tasks: msgspec.msgpack.Decoder[AnyTask] = msgspec.msgpack.Decoder(AnyTask)


class FollowerThread:
    """A follower's part of transfers, on a thread of this process. ``remote`` is its leader's view
    of it."""

    def __init__(
        self,
        nonce: str,
        transport: TransportName = "shm",
        *,
        rank: int = 1,
        nbytes: int = AREA,
        transports: Mapping[str, Transport] | None = None,
    ) -> None:
        theirs, own = socket.socketpair()
        self._own = Pipe(own, 5.0)
        self._theirs = Pipe(theirs, 5.0)
        self.region = Region(nbytes, rank_nonce(nonce, rank))
        self.area = self.region.carve(nbytes)
        if transports is None:
            transports = open_transports(transport, self.region, url="", host="127.0.0.1")
        self.links = RankLinks(rank, self.region, transports, FAST, self._own)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.remote = RemoteRank(rank, self._theirs)

    def _run(self) -> None:
        while True:
            try:
                task = self._own.receive(_tasks)
            except PipeClosed:
                return
            self.links.handle(task)

    def content(self, nbytes: int) -> bytes:
        return self.region.read(self.area, nbytes)

    def close(self) -> None:
        self._theirs.close()
        self._thread.join(5)
        assert not self._thread.is_alive()
        self.links.close()
        self._own.close()
        self.region.close()


class RankedWorker(Worker):
    """A producer of two ranks."""

    def __init__(self, transport: TransportName) -> None:
        super().__init__(AREA, transport)
        self.follower = FollowerThread(self.nonce, transport)
        self.area = self.region.carve(AREA)
        assert self.area == self.follower.area
        self.region.view(self.area, AREA)[:] = secrets.token_bytes(AREA)
        self.follower.region.view(self.area, AREA)[:] = secrets.token_bytes(AREA)

    def welcome(self) -> wire.Welcome:
        welcome = super().welcome()
        theirs = self.follower.remote.offers(5.0)
        theirs = tuple(
            msgspec.structs.replace(offer, address=offer.address or self.url) for offer in theirs
        )
        return msgspec.structs.replace(welcome, offers=(*welcome.offers, *theirs))

    def routes(self) -> list:  # type: ignore[type-arg]
        others = (partial(self.follower.remote.read_pool, timeout_s=5.0),)
        route = transfer_route(self.region, self.sessions, self.producer.may_read, others)
        return [*super().routes()[:1], route]

    def close(self) -> None:
        super().close()
        self.follower.close()


class RankedPuller(Puller):
    """A consumer of two ranks."""

    def __init__(self, transport: TransportName) -> None:
        super().__init__(AREA, transport)
        self.follower = FollowerThread(secrets.token_hex(16), transport)
        others = [self.follower.remote]
        self.spread = {kind: RankedTransport(own, others) for kind, own in self.transports.items()}
        self.consumer = Consumer(self.dial, self.region, self.spread, FAST)

    async def close(self) -> None:
        await super().close()
        self.follower.close()


@asynccontextmanager
async def opened(puller: Puller) -> AsyncIterator[Puller]:
    try:
        yield puller
    finally:
        await puller.close()


def lend(worker: Worker, n_blocks: int) -> KVRef:
    return worker.producer.lend_kv(16 * n_blocks, 16, BLOCK, holder="router", request_id="r")


def pieces(worker: RankedWorker, blocks: list[int]) -> list[wire.Piece]:
    return [wire.Piece(worker.area + block * BLOCK, BLOCK) for block in blocks]


@pytest.mark.parametrize("transport", ["shm", "http"])
async def test_every_rank_reads_its_own_ranks_blocks(transport: TransportName) -> None:
    """Chunk by chunk, to the same places, and validated once for all."""
    worker, puller = RankedWorker(transport), RankedPuller(transport)
    async with worker.serve(), opened(puller):
        ref = lend(worker, 5)
        worker.producer.ready(ref.slot, pieces(worker, [7, 3]), last=False)
        landed = asyncio.Event()
        pulling = asyncio.create_task(
            puller.consumer.pull(
                ref,
                "r",
                lambda first, them: [puller.area + (first + i) * BLOCK for i in range(len(them))],
                lambda first, count, ready: landed.set(),
                10.0,
            )
        )
        await landed.wait()
        worker.producer.ready(ref.slot, pieces(worker, [0, 9, 4]), last=True)
        pulled = await pulling
        assert pulled.transport == transport and pulled.nbytes == 5 * BLOCK
        order = [7, 3, 0, 9, 4]
        for region, mine in (
            (worker.region, puller.region.read(puller.area, 5 * BLOCK)),
            (worker.follower.region, puller.follower.content(5 * BLOCK)),
        ):
            blocks = [region.read(worker.area + block * BLOCK, BLOCK) for block in order]
            assert mine == b"".join(blocks)
        claims = [message for message in worker.messages if isinstance(message, wire.Claim)]
        assert len(claims) == 1
        async with asyncio.timeout(5):
            while worker.idle != [ref.slot]:  # noqa: ASYNC110 (a plain list)
                await asyncio.sleep(0.01)


async def test_a_producer_of_one_rank_is_read_by_the_leader_alone() -> None:
    worker, puller = Worker(AREA, "http"), RankedPuller("http")
    async with worker.serve(), opened(puller):
        area = worker.region.carve(AREA)
        worker.region.view(area, BLOCK)[:] = b"x" * BLOCK
        ref = lend(worker, 1)
        worker.producer.ready(ref.slot, [wire.Piece(area, BLOCK)], last=True)
        where = [puller.area]
        await puller.consumer.pull(ref, "r", lambda *_: where, lambda *_: None, 10.0)
        assert puller.region.read(puller.area, BLOCK) == b"x" * BLOCK
        assert puller.follower.content(BLOCK) == bytes(BLOCK)


async def test_only_pieces_of_a_claim_are_read_from_another_rank() -> None:
    """Over HTTP, where a consumer could ask for anything."""
    worker, puller = RankedWorker("http"), RankedPuller("http")
    async with worker.serve(), opened(puller), aiohttp.ClientSession() as client:
        ref = lend(worker, 1)
        worker.producer.ready(ref.slot, pieces(worker, [2]), last=True)
        channel = await puller.dial(worker.url, lambda *_: None, lambda *_: None)
        headers = {
            wire.SESSION_HEADER: channel.session,
            wire.TOKEN_HEADER: channel.token,
        }
        url = f"{worker.url}/transfer?pieces={worker.area}-{BLOCK}"
        for rank, status in (("1", 403), ("2", 400), ("-1", 400), ("one", 400)):
            async with client.get(f"{url}&rank={rank}", headers=headers) as answer:
                assert answer.status == status
        async with client.get(f"{url}&rank=1") as answer:
            assert answer.status == 401
        await channel.close()


class Fake:
    """A transport and its link, whose reads do what a test wants."""

    kind = "shm"
    memory = None

    def __init__(self, read: Callable[[float], None] = lambda timeout_s: None) -> None:
        self._read = read
        self.aborted = threading.Event()
        self.closed = threading.Event()

    def offer(self) -> TransportOffer:
        return TransportOffer("shm", "", "")

    def connect(self, offer: TransportOffer, peer: Peer, timeouts: Timeouts) -> Link:
        return self

    def read(self, pieces: object, timeout_s: float) -> None:
        self._read(timeout_s)

    def abort(self) -> None:
        self.aborted.set()

    def close(self) -> None:
        self.closed.set()


OFFERS = tuple(TransportOffer("shm", "", "", rank=rank) for rank in range(2))
PEER = Peer("http://x:1", "s", "t", "n" * 32, OFFERS)
READS = [Read(0, 2 * PAGE, 64)]


@pytest.fixture
def groups() -> Iterator[Callable[[Fake, Fake], tuple[RankedTransport, FollowerThread]]]:
    """Makes a consumer's transport of a leader's and a follower's."""
    made: list[FollowerThread] = []

    def make(leader: Fake, follower: Fake) -> tuple[RankedTransport, FollowerThread]:
        thread = FollowerThread("f" * 32, transports={"shm": follower})
        made.append(thread)
        return RankedTransport(leader, [thread.remote]), thread

    yield make
    for thread in made:
        thread.close()


def linked(transport: RankedTransport, follower: FollowerThread) -> RankedLink:
    """Past the probe, which finds what the peer's rank would have at its start."""
    page = f"triptych:{rank_nonce(PEER.nonce, 1)}".encode().ljust(64, b"\0")
    for cell in range(PAGE, 2 * PAGE, 64):
        follower.region.view(cell, 64)[:] = page
    link = transport.connect(OFFERS[0], PEER, FAST)
    assert isinstance(link, RankedLink)
    return link


Groups = Callable[[Fake, Fake], tuple[RankedTransport, FollowerThread]]


def failing(seconds: float) -> Callable[[float], None]:
    def read(timeout_s: float) -> None:
        raise TransferFailed("torn", quarantine_s=seconds)

    return read


def test_one_rank_that_failed_fails_all(groups: Groups) -> None:
    """With the longest quarantine, and not before every rank is at rest."""
    slow = threading.Event()

    def late(timeout_s: float) -> None:
        time.sleep(0.2)
        slow.set()
        raise TransferFailed("torn later", quarantine_s=7.0)

    calls = iter([lambda timeout_s: None, late])  # the probe, then the read
    link = linked(*groups(Fake(failing(2.0)), Fake(lambda timeout_s: next(calls)(timeout_s))))
    with pytest.raises(TransferFailed, match="rank 1: torn later") as caught:
        link.read(READS, 5.0)
    assert caught.value.quarantine_s == 7.0
    assert slow.is_set()
    link.close()


def test_a_rank_that_does_not_answer(groups: Groups) -> None:
    stuck = threading.Event()
    calls = iter([lambda timeout_s: None, lambda timeout_s: stuck.wait(10)])
    link = linked(*groups(Fake(), Fake(lambda timeout_s: next(calls)(timeout_s))))
    began = time.monotonic()
    with pytest.raises(TransferFailed, match="rank 1 did not answer in time") as caught:
        link.read(READS, 0.1)
    assert caught.value.quarantine_s == STUCK_QUARANTINE_S
    assert time.monotonic() - began < 5
    stuck.set()
    link.close()


def test_an_abort_reaches_a_rank_that_reads(groups: Groups) -> None:
    theirs = Fake()
    calls = iter([lambda timeout_s: None, lambda timeout_s: theirs.aborted.wait(10)])
    theirs._read = lambda timeout_s: next(calls)(timeout_s)
    own = Fake()
    link = linked(*groups(own, theirs))
    reading = threading.Thread(target=link.read, args=(READS, 10.0))
    reading.start()
    link.abort()
    reading.join(5)
    assert not reading.is_alive() and own.aborted.is_set()
    link.close()
    assert theirs.closed.wait(5) and own.closed.is_set()


def test_what_goes_wrong_unexpectedly_is_answered_too(groups: Groups) -> None:
    def broken(timeout_s: float) -> None:
        raise RuntimeError("a device error")

    calls = iter([lambda timeout_s: None, broken])
    link = linked(*groups(Fake(), Fake(lambda timeout_s: next(calls)(timeout_s))))
    with pytest.raises(TransferFailed, match="rank 1: a device error") as caught:
        link.read(READS, 5.0)
    assert caught.value.quarantine_s == STUCK_QUARANTINE_S
    link.close()


def test_a_rank_that_is_gone(groups: Groups) -> None:
    transport, follower = groups(Fake(), Fake())
    link = linked(transport, follower)
    follower._own.close()
    with pytest.raises(TransferFailed, match="rank 1 is gone"):
        link.read(READS, 5.0)
    with pytest.raises(TransferFailed, match="rank 1 is gone"):
        follower.remote.read_pool(0, 64, 5.0)
    link.close()


def test_another_process_than_the_peers_rank_is_refused(groups: Groups) -> None:
    """A rank that came back, or a mix-up of ranks: the start of its pool says who it is."""
    transport, _ = groups(Fake(), Fake())
    with pytest.raises(TransportUnavailable, match="rank 1: the memory behind the offer"):
        transport.connect(OFFERS[0], PEER, FAST)


@pytest.mark.parametrize("ranks", [(0, 1, 2), (0, 2)])
def test_another_number_of_ranks_is_refused(groups: Groups, ranks: tuple[int, ...]) -> None:
    transport, _ = groups(Fake(), Fake())
    offers = tuple(TransportOffer("shm", "", "", rank=rank) for rank in ranks)
    peer = Peer("http://x:1", "s", "t", "n" * 32, offers)
    with pytest.raises(TransportUnavailable, match="the peer offers ranks .* this group has 2"):
        transport.connect(offers[0], peer, FAST)


def test_a_kind_that_a_rank_cannot_have_is_refused(groups: Groups) -> None:
    follower = FollowerThread("f" * 32, transports={})
    transport = RankedTransport(Fake(), [follower.remote])
    with pytest.raises(TransportUnavailable, match="rank 1: shm cannot be had here"):
        transport.connect(OFFERS[0], PEER, FAST)
    follower.close()


def test_bytes_outside_a_ranks_pool(groups: Groups) -> None:
    _, follower = groups(Fake(), Fake())
    assert follower.remote.read_pool(0, 9, 5.0) == b"triptych:"
    with pytest.raises(TransferFailed, match="rank 1: .* outside a region"):
        follower.remote.read_pool(follower.region.nbytes - 1, 2, 5.0)
