"""``triptych bench transfer``: what it takes to bring ready bytes from one process to another.

For every size, number of pieces and transport: a *pull* (claim, ready, read, validate, release;
what a consumer waits for once an embedding is ready) and the *read* inside it, with a copy of the
same bytes within this process timed in turn with them, since machines are shared and noisy.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import secrets
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection

import numpy as np
from rich.console import Console
from rich.table import Table

from triptych import wire
from triptych.bench import producer
from triptych.config import BenchConfig, Timeouts, TransportName
from triptych.errors import ConfigError, TransferFailed
from triptych.refs import AnyRef
from triptych.transfer.consumer import Consumer
from triptych.transfer.handshake import dial
from triptych.transfer.region import Region
from triptych.transfer.transports.choice import open_transports

WARM = 2
"""Pulls of each kind that are not counted."""
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
JOIN_S = 10.0


@dataclass(frozen=True)
class Row:
    """Medians of one size, number of pieces and transport."""

    transport: str
    nbytes: int
    pieces: int
    pull_us: float
    read_us: float
    copy_us: float
    """The same bytes copied within one process, one thread."""

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / self.read_us / 1000

    @property
    def ratio(self) -> float:
        """Of the copy's speed that the read reaches."""
        return self.copy_us / self.read_us


def parse_size(text: str) -> int:
    """Bytes of "64K", "16M", "1G" or "4096". Raises ConfigError."""
    digits = text.rstrip("KMG")
    unit = UNITS.get(text[len(digits) :])
    if unit is None or not digits.isdecimal() or int(digits) < 1:
        raise ConfigError(f"not a size: {text!r}; write 4096, 64K, 16M or 1G")
    return int(digits) * unit


async def run(config: BenchConfig) -> int:
    """Print the table, write the JSON. The exit status."""
    console = Console(highlight=False)
    sizes = [parse_size(size) for size in config.sizes]
    if not sizes or not config.transports or min(config.pieces, default=0) < 1:
        raise ConfigError("bench transfer needs sizes, transports and numbers of pieces")
    rows: list[Row] = []
    for name in config.transports:
        with console.status(f"{name}: {', '.join(config.sizes)}"):
            rows += await measure(name, sizes, config.pieces, config.repeats)
    console.print(_table(rows))
    if config.json is not None:
        found = [{**asdict(row), "gb_per_s": row.gb_per_s, "ratio": row.ratio} for row in rows]
        config.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


async def measure(
    name: TransportName, sizes: Sequence[int], pieces: Sequence[int], repeats: int
) -> list[Row]:
    """All rows of one transport, against a child process that lives as long as this takes."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    secret = secrets.token_hex(16).encode()
    child = context.Process(target=producer.run, args=(theirs, secret, name, max(sizes)))
    child.start()
    theirs.close()
    region = Region(max(sizes), secrets.token_hex(16))
    offset = region.carve(max(sizes))
    timeouts = Timeouts()
    transports = open_transports(name, region, url="http://127.0.0.1:1", host="127.0.0.1")

    async def connect(url, on_message, on_lost):  # type: ignore[no-untyped-def]
        return await dial(url, producer.hello, secret, timeouts, None, on_message, on_lost)

    consumer = Consumer(connect, region, transports, timeouts)
    bench = _Bench(pipe, consumer, region, offset, timeouts.kv)
    try:
        return [
            await bench.row(name, nbytes, count, repeats)
            for nbytes in sizes
            for count in pieces
            if nbytes % count == 0
        ]
    finally:
        await consumer.close()
        pipe.close()
        await asyncio.to_thread(child.join, JOIN_S)
        child.kill()
        for transport in transports.values():
            transport.close()
        region.close()


class _Bench:
    def __init__(
        self, pipe: Connection, consumer: Consumer, region: Region, offset: int, timeout_s: float
    ) -> None:
        self._pipe = pipe
        self._consumer = consumer
        self._target = np.frombuffer(region.view(offset, region.nbytes - offset), np.uint8)
        self._offset = offset
        self._timeout_s = timeout_s

    async def row(self, name: str, nbytes: int, pieces: int, repeats: int) -> Row:
        pulls, reads, copies = [], [], []
        source, target = producer.content(nbytes), np.zeros(nbytes, np.uint8)
        for _ in range(WARM + repeats):
            self._target[:nbytes:4096] = 0
            pull, read = await self._pull(nbytes, pieces)
            pulls.append(pull)
            reads.append(read)
            begin = time.perf_counter()
            np.copyto(target, source)
            copies.append(time.perf_counter() - begin)
            if not np.array_equal(self._target[:nbytes], source):
                raise TransferFailed(f"{name}: {nbytes} bytes arrived wrong")
        medians = [1e6 * statistics.median(times[WARM:]) for times in (pulls, reads, copies)]
        return Row(name, nbytes, pieces, *medians)

    async def _pull(self, nbytes: int, pieces: int) -> tuple[float, float]:
        """Seconds of the pull and of the read in it."""
        ref = await asyncio.to_thread(self._lend, nbytes, pieces)
        size = nbytes // pieces
        place = partial(_places, self._offset, size)
        begin = time.perf_counter()
        pulled = await self._consumer.pull(
            ref, producer.HOLDER, place, lambda first, count, ready: None, self._timeout_s
        )
        return time.perf_counter() - begin, pulled.read_s

    def _lend(self, nbytes: int, pieces: int) -> AnyRef:
        self._pipe.send((nbytes, pieces))
        return wire.decode(self._pipe.recv_bytes(), wire.Claim).ref


def _places(offset: int, size: int, first: int, pieces: Sequence[wire.Piece]) -> list[int]:
    return [offset + (first + i) * size for i in range(len(pieces))]


def _table(rows: Sequence[Row]) -> Table:
    table = Table(
        "transport",
        title="medians; copy: the same bytes within one process; ratio: speed of read to copy",
    )
    for name in ("size", "pieces", "pull", "read", "GB/s", "copy", "ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.transport,
            _size(row.nbytes),
            str(row.pieces),
            _time(row.pull_us),
            _time(row.read_us),
            f"{row.gb_per_s:.2f}",
            _time(row.copy_us),
            f"{row.ratio:.2f}",
        )
    return table


def _size(nbytes: int) -> str:
    unit, name = next((unit, name) for name, unit in reversed(UNITS.items()) if nbytes % unit == 0)
    return f"{nbytes // unit} {name}iB" if name else f"{nbytes} B"


def _time(us: float) -> str:
    return f"{us:.0f} µs" if us < 1000 else f"{us / 1000:.2f} ms"
