"""Real transports between regions of which one or both are on a GPU."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from tests.conformance.test_transports import ServerThread
from tests.transfer_rig import FAST
from triptych.errors import ConfigError, TransferFailed
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
PAIRS = [("http", CUDA, CUDA), ("http", CPU, CUDA), ("http", CUDA, CPU), ("nvlink", CUDA, CUDA)]


def name(pair: tuple[str, torch.device, torch.device]) -> str:
    return f"{pair[0]}-{pair[1].type}-{pair[2].type}"


class Pair:
    def __init__(self, source: BaseRegion, target: BaseRegion, link: Link) -> None:
        self.source, self.target, self.link = source, target, link
        assert source.carve(AREA) == target.carve(AREA) == 2 * PAGE
        self.content = random.Random(1).randbytes(AREA)
        self.put(self.content)

    def put(self, data: bytes) -> None:
        memory = self.source.tensor(2 * PAGE, (len(data),), torch.uint8)
        memory.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        torch.cuda.synchronize()

    def check(self, reads: list[Read]) -> None:
        """The target, zero before, has the pieces and nothing else."""
        self.link.read(reads, TIMEOUT_S)
        expected = bytearray(AREA)
        for remote, local, nbytes in reads:
            remote, local = remote - 2 * PAGE, local - 2 * PAGE
            expected[local : local + nbytes] = self.content[remote : remote + nbytes]
        assert self.target.read(2 * PAGE, AREA) == bytes(expected)


@pytest.fixture(params=PAIRS, ids=name)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    kind, source_device, target_device = request.param
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
    if not has_nvlink():
        pytest.skip("no Mooncake package with NVLink")
    source = open_region(AREA, "s" * 32, source_device)
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
        if source.is_cuda:
            torch.cuda.current_stream().synchronize()
        pair.link.read([Read(2 * PAGE, 2 * PAGE, 1 << 20)], TIMEOUT_S)
        assert int((target[: 1 << 18] != value).sum()) == 0


def test_auto_takes_nvlink_where_it_can_be_had() -> None:
    transports = open_transports(
        "auto", open_region(PAGE, "n", CUDA), url="http://x:1", host="127.0.0.1"
    )
    assert list(transports) == (["mooncake", "http"] if has_nvlink() else ["http"])
    for transport in transports.values():
        transport.close()


def test_shared_memory_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="shm moves memory of the host"):
        open_transports("shm", open_region(PAGE, "n", CUDA), url="http://x:1", host="127.0.0.1")


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
