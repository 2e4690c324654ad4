"""READ bandwidth between the GPU memory of two processes, beside copies within one process.

``python benchmarks/gpu_read.py [--transport mooncake|shm]``: the producer on the last GPU, the
consumer on the first (the same one where there is only one). "copy" is ``Tensor.copy_`` between
the two places, "pinned" the same bytes through page-locked memory of one process, the copies of
both directions overlapped: what ``shm`` can reach at best. Every read is checked by content; exit
status 1 when one was wrong. ``--device cpu --area-mib 32`` rehearses it without a GPU.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import msgspec
import torch
import tyro

from triptych.config import Timeouts
from triptych.transfer.device_region import open_region
from triptych.transfer.region import BaseRegion
from triptych.transfer.transports.base import Link, Peer, Read, Transport, probe
from triptych.transfer.transports.mooncake import MooncakeTransport
from triptych.transfer.transports.shm_device import StagedTransport
from triptych.transfer.transports.staging import LAYOUT, Layout
from triptych.wire import TransportOffer

MIB = 1 << 20
SIZES = (MIB // 16, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, 512 * MIB)
PIECES = (1, 16, 256, 1024)
PIECES_NBYTES = 64 * MIB
ROUNDS = 20
TIMEOUT_S = 60.0
NONCE = "n" * 32
SEED = 1


@dataclass(frozen=True)
class Config:
    transport: Literal["mooncake", "shm"] = "mooncake"
    role: Literal["consumer", "producer"] = "consumer"
    device: Literal["cuda", "cpu"] = "cuda"
    area_mib: int = 512
    """Of each region; larger reads are left out."""
    buffers: int = LAYOUT.buffers
    """shm: page-locked buffers of the link."""
    buffer_kib: int = LAYOUT.nbytes >> 10
    """shm: KiB of each."""

    @property
    def area(self) -> int:
        return self.area_mib * MIB

    def place(self, index: int) -> torch.device:
        """The first (0) or last (-1) GPU."""
        if self.device == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", range(torch.cuda.device_count())[index])

    def open(self, region: BaseRegion) -> Transport:
        if self.transport == "mooncake":
            return MooncakeTransport(region, "127.0.0.1")
        return StagedTransport(region, Layout(self.buffers, self.buffer_kib << 10))


def content(nbytes: int, device: torch.device) -> torch.Tensor:
    """(nbytes,) uint8, the same in every process on this kind of device."""
    generator = torch.Generator(device).manual_seed(SEED)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device, generator=generator)


def complete(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)


def produce(config: Config) -> None:
    device = config.place(-1)
    region = open_region(config.area, NONCE, device)
    memory = region.tensor(region.carve(config.area), (config.area,), torch.uint8)
    memory.copy_(content(config.area, device))
    complete(memory)
    transport = config.open(region)
    print("offer " + msgspec.json.encode(transport.offer()).decode(), flush=True)
    sys.stdin.readline()
    transport.close()


def consume(config: Config) -> bool:
    """Whether all that was read was right."""
    command = [sys.executable, __file__, *sys.argv[1:], "--role", "producer"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as producer:
        assert producer.stdin is not None and producer.stdout is not None
        try:
            line = next(line for line in producer.stdout if line.startswith("offer "))
            offer = msgspec.json.decode(line.removeprefix("offer "), type=TransportOffer)
            return measure(config, offer)
        finally:
            producer.stdin.close()


def measure(config: Config, offer: TransportOffer) -> bool:
    device = config.place(0)
    region = open_region(config.area, "c" * 32, device)
    offset = region.carve(config.area)
    transport = config.open(region)
    link = transport.connect(offer, Peer("http://x:1", "", ""), Timeouts())
    probe(link, region, NONCE, TIMEOUT_S)
    print(f"{config.transport} moves bytes by {offer.protocol}; {torch.cuda.device_count()} GPU(s)")
    if config.transport == "shm":
        print(f"{config.buffers} buffers of {config.buffer_kib} KiB")
    target = region.tensor(offset, (config.area,), torch.uint8)
    expected = content(config.area, device)
    source = content(config.area, config.place(-1))
    pinned = Pinned(source.device, device)
    print(
        f"{'size':>10} {'READ us':>10} {'GB/s':>6} {'copy GB/s':>10} {'pinned GB/s':>12}  content"
    )
    wrong = 0
    for nbytes in (size for size in SIZES if size <= config.area):
        target.zero_()
        complete(target)
        read_s = timed(lambda n=nbytes: link.read([Read(offset, offset, n)], TIMEOUT_S))
        good = torch.equal(target[:nbytes], expected[:nbytes]) and not target[nbytes:].any()
        copy_s = timed(lambda n=nbytes: copy(target[:n], source[:n]))
        target.zero_()
        complete(target)
        pinned_s = timed(lambda n=nbytes: pinned.copy(target[:n], source[:n]))
        assert torch.equal(target[:nbytes], expected[:nbytes])
        wrong += not good
        print(
            f"{nbytes / MIB:>6.2f} MiB {read_s * 1e6:>10.1f} {nbytes / read_s / 1e9:>6.1f} "
            f"{nbytes / copy_s / 1e9:>10.1f} {nbytes / pinned_s / 1e9:>12.1f}  "
            f"{'ok' if good else 'WRONG'}"
        )
    wrong += pieces(link, offset, target, expected)
    link.close()
    transport.close()
    return not wrong


def pieces(link: Link, offset: int, target: torch.Tensor, expected: torch.Tensor) -> int:
    """The same bytes in pieces, which land in reverse order. How many reads were wrong."""
    total = min(PIECES_NBYTES, len(target))
    print(f"{total // MIB} MiB in pieces:")
    wrong = 0
    for count in PIECES:
        size = total // count
        reads = [
            Read(offset + i * size, offset + (count - 1 - i) * size, size) for i in range(count)
        ]
        target.zero_()
        complete(target)
        read_s = timed(lambda reads=reads: link.read(reads, TIMEOUT_S))
        wanted = expected[:total].view(count, size).flip(0)
        good = torch.equal(target[:total].view(count, size), wanted)
        wrong += not good
        print(
            f"{count:>6} pieces {read_s * 1e6:>10.1f} us {total / read_s / 1e9:>6.1f} GB/s  "
            f"{'ok' if good else 'WRONG'}"
        )
    return wrong


def copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)
    complete(source, target)


class Pinned:
    """Copies through page-locked buffers of this process, both directions at once."""

    def __init__(self, source: torch.device, target: torch.device) -> None:
        self._cuda = target.type == "cuda"
        self._buffers = [
            torch.empty(LAYOUT.nbytes, dtype=torch.uint8, pin_memory=self._cuda)
            for _ in range(LAYOUT.buffers)
        ]
        if self._cuda:
            self._out, self._in = torch.cuda.Stream(source), torch.cuda.Stream(target)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        emptied: list[torch.cuda.Event] = []
        parts = zip(target.split(LAYOUT.nbytes), source.split(LAYOUT.nbytes), strict=True)
        for index, (to, part) in enumerate(parts):
            buffer = self._buffers[index % len(self._buffers)][: len(part)]
            with torch.cuda.stream(self._out) if self._cuda else nullcontext():
                if self._cuda and index >= len(self._buffers):
                    self._out.wait_event(emptied[index - len(self._buffers)])
                buffer.copy_(part, non_blocking=True)
                filled = self._out.record_event() if self._cuda else None
            with torch.cuda.stream(self._in) if self._cuda else nullcontext():
                if filled is not None:
                    self._in.wait_event(filled)
                to.copy_(buffer, non_blocking=True)
                if self._cuda:
                    emptied.append(self._in.record_event())
        if self._cuda:
            self._in.synchronize()


def timed(work: Callable[[], None]) -> float:
    """Median seconds, after two runs that do not count."""
    seconds = []
    for _ in range(ROUNDS + 2):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def main(config: Config) -> int:
    if config.device == "cpu":
        torch.set_num_threads(1)
    if config.role == "producer":
        produce(config)
        return 0
    return 0 if consume(config) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
