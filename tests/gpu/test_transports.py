"""Real transports between regions of which one or both are on a GPU."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from tests.conformance.test_transports import ServerThread
from tests.transfer_rig import FAST
from triptych.errors import TransferFailed
from triptych.transfer.device_region import open_region
from triptych.transfer.region import PAGE, BaseRegion
from triptych.transfer.transports.base import Link, Peer, Read, TransportUnavailable, probe
from triptych.transfer.transports.choice import open_transports
from triptych.transfer.transports.http import HttpTransport
from triptych.transfer.transports.mooncake import MooncakeTransport, has_nvlink

AREA = 12 << 20
TIMEOUT_S = 20.0
CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
OTHER = torch.device("cuda", 1)
PAIRS = [
    *(("http", CUDA, CUDA), ("http", CPU, CUDA), ("http", CUDA, CPU)),
    *(("shm", CUDA, CUDA), ("shm", CPU, CUDA), ("shm", CUDA, CPU)),
    *(("shm", CUDA, OTHER), ("shm", OTHER, CUDA), ("nvlink", CUDA, CUDA)),
]
"""How, from where, to where."""


def name(pair: tuple[str, torch.device, torch.device]) -> str:
    return f"{pair[0]}-{pair[1]}-{pair[2]}"


class Pair:
    def __init__(self, source: BaseRegion, target: BaseRegion, link: Link) -> None:
        self.source, self.target, self.link = source, target, link
        assert source.carve(AREA) == target.carve(AREA) == 2 * PAGE
        self.content = random.Random(1).randbytes(AREA)
        self.put(self.content)

    def put(self, data: bytes) -> None:
        memory = self.source.tensor(2 * PAGE, (len(data),), torch.uint8)
        memory.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        complete(memory)

    def check(self, reads: list[Read]) -> None:
        """The target, zero before, has the pieces and nothing else."""
        self.link.read(reads, TIMEOUT_S)
        expected = bytearray(AREA)
        for remote, local, nbytes in reads:
            remote, local = remote - 2 * PAGE, local - 2 * PAGE
            expected[local : local + nbytes] = self.content[remote : remote + nbytes]
        assert self.target.read(2 * PAGE, AREA) == bytes(expected)


def complete(memory: torch.Tensor) -> None:
    """The host sees what was written there, as it must before anything is offered."""
    if memory.is_cuda:
        torch.cuda.synchronize(memory.device)


def shm_pair(source: BaseRegion, target: BaseRegion) -> Iterator[Pair]:
    producer, consumer = (
        open_transports("shm", region, url="http://x:1", host="127.0.0.1")["shm"]
        for region in (source, target)
    )
    link = consumer.connect(producer.offer(), Peer("http://x:1", "", ""), FAST)
    yield Pair(source, target, link)
    link.close()
    link.close()
    consumer.close()
    producer.close()


@pytest.fixture(params=PAIRS, ids=name)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    kind, source_device, target_device = request.param
    if OTHER in (source_device, target_device) and torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    target = open_region(AREA, "t" * 32, target_device)
    if kind == "http":
        server = ServerThread(source_device, AREA)
        consumer = HttpTransport(target, "http://127.0.0.1:1")
        offer = server.worker.transports["http"].offer()
        link: Link = consumer.connect(offer, server.peer, FAST)
        yield Pair(server.worker.region, target, link)
        link.close()
        server.close()
        return
    source = open_region(AREA, "s" * 32, source_device)
    if kind == "shm":
        yield from shm_pair(source, target)
        return
    if not has_nvlink():
        pytest.skip("no Mooncake package with NVLink")
    producer, reader = (MooncakeTransport(region, "127.0.0.1") for region in (source, target))
    assert producer.protocol == reader.protocol == "nvlink"
    link = reader.connect(producer.offer(), Peer("http://x:1", "", ""), FAST)
    yield Pair(source, target, link)
    link.close()
    reader.close()
    producer.close()


@pytest.mark.parametrize("sizes", [[1], [PAGE], [(4 << 20) + 3], [9 << 20], [7, 0, 9, 4096] * 3])
def test_bytes_arrive_where_they_belong(pair: Pair, sizes: list[int]) -> None:
    draw = random.Random(2)
    reads, at = [], 2 * PAGE
    for nbytes in sizes:
        reads.append(Read(draw.randrange(2 * PAGE, 2 * PAGE + AREA - nbytes), at, nbytes))
        at += nbytes
    pair.check(reads)


def test_many_pieces_out_of_order(pair: Pair) -> None:
    blocks = list(range(600))
    random.Random(3).shuffle(blocks)
    pair.check(
        [
            Read(2 * PAGE + block * 5000, 2 * PAGE + index * 5000, 5000)
            for index, block in enumerate(blocks)
        ]
    )


def test_a_link_sees_what_is_written_later(pair: Pair) -> None:
    for data in (b"first", b"later"):
        pair.put(data)
        pair.link.read([Read(2 * PAGE, 3 * PAGE, 5)], TIMEOUT_S)
        assert pair.target.read(3 * PAGE, 5) == data


def test_the_probe_knows_whose_memory_it_reads(pair: Pair) -> None:
    probe(pair.link, pair.target, pair.source.nonce, TIMEOUT_S)
    with pytest.raises(TransferFailed, match="not that of the peer"):
        probe(pair.link, pair.target, "0" * 32, TIMEOUT_S)


def test_outside_is_refused(pair: Pair) -> None:
    for bad in (Read(AREA + PAGE, 2 * PAGE, 2 * PAGE), Read(2 * PAGE, AREA + PAGE, 2 * PAGE)):
        with pytest.raises(TransferFailed, match="outside"):
            pair.link.read([Read(2 * PAGE, 2 * PAGE, 64), bad], TIMEOUT_S)
    assert not any(pair.target.read(2 * PAGE, AREA))


def test_a_kernel_sees_what_was_read(pair: Pair) -> None:
    """No synchronisation between ``read`` and the next kernel, a hundred times."""
    target = pair.target.tensor(2 * PAGE, (AREA // 4,), torch.int32)
    source = pair.source.tensor(2 * PAGE, (AREA // 4,), torch.int32)
    for value in range(100):
        source.fill_(value)
        complete(source)
        pair.link.read([Read(2 * PAGE, 2 * PAGE, 1 << 20)], TIMEOUT_S)
        assert int((target[: 1 << 18] != value).sum()) == 0


def test_auto_takes_nvlink_where_it_can_be_had_then_shared_memory() -> None:
    transports = open_transports(
        "auto", open_region(PAGE, "n", CUDA), url="http://x:1", host="127.0.0.1"
    )
    assert list(transports) == [*(["mooncake"] if has_nvlink() else []), "shm", "http"]
    for transport in transports.values():
        transport.close()


def test_nvlink_is_not_tried_on_another_host() -> None:
    if not has_nvlink():
        pytest.skip("no Mooncake package with NVLink")
    transport = MooncakeTransport(open_region(PAGE, "n", CUDA), "127.0.0.1")
    offer = transport.offer()
    fields = {key: getattr(offer, key) for key in offer.__struct_fields__}
    other = type(offer)(**{**fields, "host": "elsewhere"})
    with pytest.raises(TransportUnavailable, match="another host"):
        transport.connect(other, Peer("http://x:1", "", ""), FAST)
    transport.close()
