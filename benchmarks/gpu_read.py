"""READ bandwidth between the GPU memory of two processes, beside a copy within one process.

``python benchmarks/gpu_read.py [--transport mooncake]``: the producer on the last GPU, the
consumer on the first (the same one where there is only one). Every read is checked by content.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import msgspec
import torch
import tyro

from triptych.config import Timeouts
from triptych.transfer.device_region import DeviceRegion
from triptych.transfer.transports.base import Link, Peer, Read, probe
from triptych.transfer.transports.mooncake import MooncakeTransport
from triptych.wire import TransportOffer

MIB = 1 << 20
AREA = 512 * MIB
SIZES = (MIB // 16, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, 512 * MIB)
PIECES = (1, 16, 256, 1024)
PIECES_NBYTES = 64 * MIB
ROUNDS = 20
TIMEOUT_S = 60.0
NONCE = "n" * 32
SEED = 1


@dataclass(frozen=True)
class Config:
    role: Literal["consumer", "producer"] = "consumer"


def content(device: torch.device) -> torch.Tensor:
    """(AREA,) uint8, the same in every process on this kind of device."""
    generator = torch.Generator(device).manual_seed(SEED)
    return torch.randint(0, 256, (AREA,), dtype=torch.uint8, device=device, generator=generator)


def produce() -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    region = DeviceRegion(AREA, NONCE, device)
    offset = region.carve(AREA)
    region.tensor(offset, (AREA,), torch.uint8).copy_(content(device))
    torch.cuda.synchronize(device)
    transport = MooncakeTransport(region, "127.0.0.1")
    print("offer " + msgspec.json.encode(transport.offer()).decode(), flush=True)
    sys.stdin.readline()


def consume() -> None:
    command = [sys.executable, __file__, "--role", "producer"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as producer:
        assert producer.stdin is not None and producer.stdout is not None
        try:
            line = next(line for line in producer.stdout if line.startswith("offer "))
            offer = msgspec.json.decode(line.removeprefix("offer "), type=TransportOffer)
            measure(offer)
        finally:
            producer.stdin.close()


def measure(offer: TransportOffer) -> None:
    device = torch.device("cuda", 0)
    region = DeviceRegion(AREA, "c" * 32, device)
    offset = region.carve(AREA)
    transport = MooncakeTransport(region, "127.0.0.1")
    link = transport.connect(offer, Peer("http://x:1", "", ""), Timeouts())
    probe(link, region, NONCE, TIMEOUT_S)
    print(f"READ moves bytes by {offer.protocol}; {torch.cuda.device_count()} GPU(s)")
    target = region.tensor(offset, (AREA,), torch.uint8)
    expected = content(device)
    source = content(torch.device("cuda", torch.cuda.device_count() - 1))
    print(f"{'size':>10} {'READ us':>10} {'GB/s':>7} {'copy us':>10} {'GB/s':>7}  ratio  content")
    for nbytes in SIZES:
        target.zero_()
        torch.cuda.synchronize()
        read_s = timed(lambda n=nbytes: link.read([Read(offset, offset, n)], TIMEOUT_S))
        good = torch.equal(target[:nbytes], expected[:nbytes]) and not target[nbytes:].any()
        copy_s = timed(lambda n=nbytes: copy(target[:n], source[:n]))
        print(
            f"{nbytes / MIB:>6.2f} MiB {read_s * 1e6:>10.1f} {nbytes / read_s / 1e9:>7.1f} "
            f"{copy_s * 1e6:>10.1f} {nbytes / copy_s / 1e9:>7.1f} {copy_s / read_s:>6.2f}  "
            f"{'ok' if good else 'WRONG'}"
        )
    pieces(link, offset, target, expected)


def pieces(link: Link, offset: int, target: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bytes in pieces, which land in reverse order."""
    print(f"{PIECES_NBYTES // MIB} MiB in pieces:")
    for count in PIECES:
        size = PIECES_NBYTES // count
        reads = [
            Read(offset + i * size, offset + (count - 1 - i) * size, size) for i in range(count)
        ]
        target.zero_()
        torch.cuda.synchronize()
        read_s = timed(lambda reads=reads: link.read(reads, TIMEOUT_S))
        wanted = expected[:PIECES_NBYTES].view(count, size).flip(0)
        good = torch.equal(target[:PIECES_NBYTES].view(count, size), wanted)
        print(f"{count:>6} pieces {read_s * 1e6:>10.1f} us  {'ok' if good else 'WRONG'}")


def copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)
    torch.cuda.synchronize(source.device)
    torch.cuda.synchronize(target.device)


def timed(work: Callable[[], None]) -> float:
    """Median seconds, after two runs that do not count."""
    seconds = []
    for _ in range(ROUNDS + 2):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


if __name__ == "__main__":
    produce() if tyro.cli(Config).role == "producer" else consume()
