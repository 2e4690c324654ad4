"""What every transport must do, asked of each of them: regions of one process, real transports."""

from __future__ import annotations

import asyncio
import errno
import random
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pytest
import torch

from tests.transfer_rig import CPU, FAST, SECRET, Worker, hello
from triptych.errors import TransferFailed
from triptych.transfer.handshake import dial
from triptych.transfer.region import PAGE, Region
from triptych.transfer.transports.base import (
    Link,
    Peer,
    Read,
    Transport,
    TransportUnavailable,
    probe,
)
from triptych.transfer.transports.http import HttpTransport, transfer_route
from triptych.transfer.transports.memory import MemoryTransport
from triptych.transfer.transports.mooncake import MooncakeTransport
from triptych.transfer.transports.shm import ShmTransport
from triptych.transfer.transports.shm_device import StagedTransport
from triptych.transfer.transports.staging import Layout
from triptych.wire import TransportOffer

SMALL = Layout(3, 96 << 10)
"""Buffers so small that most reads here take several, and each of them several times."""


def staged(region: Region) -> StagedTransport:
    """As for GPU memory, with host memory in its place."""
    return StagedTransport(region, SMALL)


MAKE: dict[str, tuple[Callable[[Region], Transport], Callable[[Region], Transport]]] = {
    "memory": (MemoryTransport, MemoryTransport),
    "shm": (ShmTransport, ShmTransport),
    "staged": (staged, staged),
    "staged to mapped": (staged, ShmTransport),
    "mapped to staged": (ShmTransport, staged),
    "mooncake": (lambda region: MooncakeTransport(region, "127.0.0.1"),) * 2,
}
"""The producer's and the consumer's side."""
KINDS = [*MAKE, "http"]
WAITS = ["http", "mooncake", "staged", "staged to mapped"]
"""Their reads wait for the peer."""
AREA = 8 << 20
TIMEOUT_S = 10.0


class ServerThread:
    """A worker on its own loop, with one open channel whose session may read everything."""

    def __init__(self, device: torch.device = CPU, nbytes: int = AREA) -> None:
        self._device, self._nbytes = device, nbytes
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._run()))
        self._stop = asyncio.Event()
        self._thread.start()
        assert self._ready.wait(TIMEOUT_S)

    async def _run(self) -> None:
        self.worker = Worker(self._nbytes, transport="http", device=self._device)
        worker = self.worker
        route = transfer_route(worker.region, worker.sessions, lambda session, pieces: True)
        worker.routes = lambda: [*Worker.routes(worker)[:1], route]  # type: ignore[method-assign]
        async with worker.serve():
            channel = await dial(
                worker.url, hello, SECRET, FAST, None, lambda *_: None, lambda *_: None
            )
            self.peer = Peer(worker.url, channel.session, channel.token)
            self._ready.set()
            await self._stop.wait()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(TIMEOUT_S)
        self._loop.close()


@dataclass
class Pair:
    name: str
    source: Region
    target: Region
    producer: Transport
    consumer: Transport
    peer: Peer
    links: list[Link] = field(default_factory=list)

    def connect(self) -> Link:
        link = self.consumer.connect(self.producer.offer(), self.peer, FAST)
        self.links.append(link)
        return link


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    target = Region(AREA, "t" * 32)
    if request.param == "http":
        server = ServerThread()
        source = server.worker.region
        subject = Pair(
            "http",
            source,
            target,
            server.worker.transports["http"],
            HttpTransport(target, "http://127.0.0.1:1"),
            server.peer,
        )
    else:
        server = None
        source = Region(AREA, "s" * 32)
        produce, consume = MAKE[request.param]
        # Another process each time, as far as it is known: Mooncake gives each another name.
        peer = Peer("http://x:1", "", "", secrets.token_hex(16))
        subject = Pair(request.param, source, target, produce(source), consume(target), peer)
    assert source.carve(AREA) == target.carve(AREA) == 2 * PAGE
    draw = random.Random(1)
    source.view(2 * PAGE, AREA)[:] = draw.randbytes(AREA)
    yield subject
    for link in subject.links:
        link.close()
        link.close()
    subject.consumer.close()
    subject.producer.close()
    subject.producer.close()
    if server is not None:
        server.close()


def check(pair: Pair, reads: list[Read], before: bytes) -> None:
    """The target is what it was, with the pieces laid over it one by one."""
    expected = bytearray(before)
    for remote, local, nbytes in reads:
        expected[local : local + nbytes] = pair.source.view(remote, nbytes)
    assert bytes(pair.target.view(0, pair.target.nbytes)) == bytes(expected)


@pytest.mark.parametrize("sizes", [[1], [PAGE], [(1 << 20) + 3], [5 << 20], [7, 0, 9, 4096] * 3])
def test_bytes_arrive_where_they_belong_and_nowhere_else(pair: Pair, sizes: list[int]) -> None:
    draw = random.Random(2)
    link = pair.connect()
    before = bytes(pair.target.view(0, pair.target.nbytes))
    reads, at = [], 2 * PAGE
    for nbytes in sizes:
        reads.append(Read(draw.randrange(2 * PAGE, 2 * PAGE + AREA - nbytes), at, nbytes))
        at += nbytes
    link.read(reads, TIMEOUT_S)
    check(pair, reads, before)


def test_many_pieces_out_of_order(pair: Pair) -> None:
    """More than one HTTP request holds; blocks land in another order than they lie in."""
    link = pair.connect()
    before = bytes(pair.target.view(0, pair.target.nbytes))
    blocks = list(range(600))
    random.Random(3).shuffle(blocks)
    reads = [
        Read(2 * PAGE + block * 5000, 2 * PAGE + index * 5000, 5000)
        for index, block in enumerate(blocks)
    ]
    link.read(reads, TIMEOUT_S)
    check(pair, reads, before)


def test_a_link_sees_what_is_written_later(pair: Pair) -> None:
    link = pair.connect()
    for value in (b"first", b"later"):
        pair.source.view(2 * PAGE, 5)[:] = value
        link.read([Read(2 * PAGE, 3 * PAGE, 5)], TIMEOUT_S)
        assert bytes(pair.target.view(3 * PAGE, 5)) == value


def test_memory_that_is_mapped_is_the_producers_own(pair: Pair) -> None:
    """Where bytes need not move, what the producer writes is there, and nothing was copied."""
    link = pair.connect()
    if pair.name not in ("memory", "shm"):
        assert link.memory is None
        return
    assert link.memory is not None and link.memory.dtype is torch.uint8
    for value in (b"first", b"later"):
        pair.source.view(3 * PAGE, 5)[:] = value
        assert bytes(link.memory[3 * PAGE : 3 * PAGE + 5]) == value
    view = link.memory[3 * PAGE : 3 * PAGE + 5]
    link.close()
    assert link.memory is None
    assert bytes(view) == b"later"  # mapped for as long as somebody looks at it


def test_nothing_to_read(pair: Pair) -> None:
    before = bytes(pair.target.view(0, pair.target.nbytes))
    link = pair.connect()
    link.read([], TIMEOUT_S)
    link.read([Read(2 * PAGE, 2 * PAGE, 0)], TIMEOUT_S)
    assert bytes(pair.target.view(0, pair.target.nbytes)) == before


@pytest.mark.parametrize(
    "bad",
    [
        Read(-1, 2 * PAGE, 8),
        Read(AREA + PAGE, 2 * PAGE, 2 * PAGE),
        Read(1 << 60, 2 * PAGE, 8),
        Read(2 * PAGE, -8, 8),
        Read(2 * PAGE, AREA + PAGE, 2 * PAGE),
        Read(2 * PAGE, 2 * PAGE, -1),
        Read(2 * PAGE, 2 * PAGE, 1 << 62),
    ],
)
def test_a_piece_outside_is_refused_before_any_byte_moves(pair: Pair, bad: Read) -> None:
    link = pair.connect()
    before = bytes(pair.target.view(0, pair.target.nbytes))
    with pytest.raises(TransferFailed, match="outside") as caught:
        link.read([Read(2 * PAGE, 2 * PAGE, 64), bad], TIMEOUT_S)
    assert caught.value.quarantine_s == 0
    assert bytes(pair.target.view(0, pair.target.nbytes)) == before
    good = [Read(2 * PAGE, 2 * PAGE, 64)]
    link.read(good, TIMEOUT_S)
    check(pair, good, before)


def test_the_probe_knows_whose_memory_it_reads(pair: Pair) -> None:
    link = pair.connect()
    probe(link, pair.target, pair.source.nonce, TIMEOUT_S)
    with pytest.raises(TransferFailed, match="not that of the peer"):
        probe(link, pair.target, "0" * 32, TIMEOUT_S)


def test_two_links_of_one_pair(pair: Pair) -> None:
    first, second = pair.connect(), pair.connect()
    before = bytes(pair.target.view(0, pair.target.nbytes))
    reads = [Read(2 * PAGE, 2 * PAGE, 100), Read(5 * PAGE, 9 * PAGE, 100)]
    first.read(reads[:1], TIMEOUT_S)
    first.close()
    second.read(reads[1:], TIMEOUT_S)
    check(pair, reads, before)


def test_many_probes_at_once(pair: Pair) -> None:
    """One region is the destination of all of them, from a thread for each producer."""
    links = [pair.connect() for _ in range(8)]

    def look(link: Link) -> None:
        for _ in range(20):
            probe(link, pair.target, pair.source.nonce, TIMEOUT_S)

    with ThreadPoolExecutor(len(links)) as threads:
        list(threads.map(look, links))


def test_an_aborted_link_ends_soon_and_stays_so(pair: Pair) -> None:
    link = pair.connect()
    read = Read(2 * PAGE, 2 * PAGE, 64)
    link.read([read], TIMEOUT_S)
    link.abort()
    link.abort()
    start = time.monotonic()
    if pair.name in WAITS:
        with pytest.raises(TransferFailed, match="lost"):
            link.read([read], TIMEOUT_S)
    else:  # copies, which wait for nobody
        link.read([read], TIMEOUT_S)
    assert time.monotonic() - start < 1.0
    pair.connect().read([read], TIMEOUT_S)


def test_what_is_not_there_is_a_named_error(pair: Pair) -> None:
    offer = pair.producer.offer()
    kinds: dict[str, tuple[TransportOffer, Peer]] = {
        "memory": (replace_offer(offer, address="gone"), pair.peer),
        "shm": (replace_offer(offer, address="/nonexistent/region"), pair.peer),
        "http": (offer, replace(pair.peer, url="http://127.0.0.1:9")),
        "mooncake": (replace_offer(offer, address="127.0.0.1:9"), pair.peer),
    }
    offer, peer = kinds[pair.consumer.kind]
    with pytest.raises(TransferFailed):  # on connecting or on the probe
        probe(pair.consumer.connect(offer, peer, FAST), pair.target, "s" * 32, TIMEOUT_S)


def replace_offer(offer: TransportOffer, **fields: object) -> TransportOffer:
    values = {name: getattr(offer, name) for name in offer.__struct_fields__}
    return TransportOffer(**{**values, **fields})


class TestShm:
    def test_another_host_is_not_tried(self) -> None:
        transport = ShmTransport(Region(PAGE, "n"))
        offer = replace_offer(transport.offer(), host="elsewhere")
        with pytest.raises(TransportUnavailable, match="another host"):
            transport.connect(offer, Peer("", "", ""), FAST)
        transport.close()

    def test_another_size_than_offered_is_refused(self) -> None:
        transport = ShmTransport(Region(PAGE, "n"))
        offer = transport.offer()
        offer = replace_offer(offer, nbytes=offer.nbytes + PAGE)
        with pytest.raises(TransportUnavailable, match="not the region offered"):
            transport.connect(offer, Peer("", "", ""), FAST)
        transport.close()

    def test_close_removes_the_socket(self) -> None:
        transport = ShmTransport(Region(PAGE, "n"))
        offer = transport.offer()
        transport.close()
        with pytest.raises(TransportUnavailable):
            transport.connect(offer, Peer("", "", ""), FAST)

    def test_no_descriptors_left_is_not_the_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        transport = ShmTransport(Region(PAGE, "n"))
        offer = transport.offer()
        refused = threading.Event()
        accept = socket.socket.accept

        def full_once(listener: socket.socket) -> object:
            if not refused.is_set():
                refused.set()
                raise OSError(errno.EMFILE, "too many open files")
            return accept(listener)

        monkeypatch.setattr(socket.socket, "accept", full_once)
        # The thread is in accept already: the first of these is served, the next one waits.
        for _ in range(3):
            transport.connect(offer, Peer("", "", ""), FAST).close()
        assert refused.is_set()
        transport.close()

    def test_a_closed_link_keeps_no_memory(self) -> None:
        transport = ShmTransport(Region(PAGE, "n"))
        link = transport.connect(transport.offer(), Peer("", "", ""), FAST)
        memory = weakref.ref(link.memory)
        link.close()
        link.close()
        assert memory() is None
        with pytest.raises(TransferFailed, match="outside"):
            link.read([Read(0, 2 * PAGE, 8)], TIMEOUT_S)
        transport.close()

    def test_a_mapping_outlives_its_producer(self) -> None:
        source = Region(PAGE, "n")
        target = Region(PAGE, "t")
        producer, consumer = ShmTransport(source), ShmTransport(target)
        link = consumer.connect(producer.offer(), Peer("", "", ""), FAST)
        producer.close()
        source.close()
        del source
        probe(link, target, "n", TIMEOUT_S)
