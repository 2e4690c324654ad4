"""``triptych bench transfer``: what it takes to bring ready bytes from one process to another.

For every size, number of pieces and transport: a *pull* (claim, ready, read, validate, release;
what a consumer waits for once an embedding is ready) and the *read* inside it. A copy of the same
bytes within this process, and for Mooncake the engine alone, are timed in turn with them, since
machines are shared and noisy. Everything runs in this process but the producer.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import secrets
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TypeVar

import msgspec
import torch
from rich.console import Console

from triptych import wire
from triptych.bench import plot, producer, report
from triptych.bench.bare import BareEngine
from triptych.bench.config import BenchTransferConfig
from triptych.bench.places import Places, device_of
from triptych.config import Timeouts, TransportName
from triptych.errors import ConfigError, TransferFailed
from triptych.refs import EmbeddingRef
from triptych.transfer.channel import Channel, OnLost, OnMessage
from triptych.transfer.consumer import Consumer
from triptych.transfer.handshake import dial
from triptych.transfer.transports.base import Read
from triptych.transfer.transports.choice import open_transports
from triptych.transfer.transports.mooncake import MooncakeTransport

TRANSPORTS: tuple[TransportName, ...] = ("shm", "http", "mooncake")
M = TypeVar("M", bound=wire.Message)

LEAST = 5
"""Counted rounds of a row, however long they take."""
START_S = 120.0
"""The producer's process imports torch and takes its memory."""
ANSWER_S = 10.0
JOIN_S = 10.0
PLAIN_WIDTH = 120
"""Columns of the output where it goes to a file."""


def parse_size(text: str) -> int:
    """Bytes of "64K", "16M", "1G" or "4096". Raises ConfigError."""
    digits = text.rstrip("KMG")
    unit = report.UNITS.get(text[len(digits) :])
    if unit is None or not digits.isdecimal() or int(digits) < 1:
        raise ConfigError(f"not a size: {text!r}; write 4096, 64K, 16M or 1G")
    return int(digits) * unit


@dataclass(frozen=True)
class Case:
    """What one row measures."""

    nbytes: int
    pieces: int


def cases(sizes: Sequence[str], pieces: Sequence[int]) -> list[Case]:
    """Raises ConfigError."""
    if not sizes or min(pieces, default=0) < 1:
        raise ConfigError("bench transfer needs --sizes, and --pieces of at least 1")
    found = [Case(parse_size(size), count) for size in sizes for count in pieces]
    for case in found:
        if case.nbytes % case.pieces:
            raise ConfigError(f"{case.nbytes} bytes cannot be cut into {case.pieces} equal pieces")
    return found


async def run(config: BenchTransferConfig) -> int:
    """Print the tables, write the files. The exit status. Raises ConfigError, TransferFailed."""
    todo = cases(config.sizes, config.pieces)
    if config.plot is not None:
        plot.check(config.plot)
    if config.json is not None and not config.json.parent.is_dir():
        raise ConfigError(f"{config.json}: there is no such folder")
    torch.set_num_threads(1)  # one core copies, as one core reads
    console = Console(
        highlight=False, markup=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH
    )
    device = device_of(config.device)
    producer_device = device_of(config.producer_device or config.device)
    found = report.report(str(producer_device), str(device))
    console.print(f"from {producer_device} to {device}, {found.cpus} cores, load {found.load:.1f}")
    places = Places(max(case.nbytes for case in todo), device, producer_device)
    try:
        for name in config.transports or TRANSPORTS:
            try:
                with console.status(f"{name}: {', '.join(config.sizes)}"):
                    rows = await measure(name, places, todo, config)
            except Absent as exc:
                if config.transports:
                    raise ConfigError(exc.message) from exc
                console.print(f"\n{name} is not measured: {exc.message}")
                found = msgspec.structs.replace(found, absent={**found.absent, name: exc.message})
                continue
            for kind, own in itertools.groupby(rows, lambda row: row.transport):
                console.print(f"\n{kind}{f' ({rows[0].protocol})' if rows[0].protocol else ''}")
                console.print(report.table(list(own)))
            found = msgspec.structs.replace(found, rows=(*found.rows, *rows))
    finally:
        places.close()
    if not found.rows:
        raise ConfigError("no transport could be measured")
    if config.json is not None:
        report.save(found, config.json)
    if config.plot is not None:
        plot.draw(found, config.plot)
    return 0


class Absent(ConfigError):
    """A transport cannot be had here between these devices."""


async def measure(
    name: TransportName, places: Places, todo: Sequence[Case], config: BenchTransferConfig
) -> list[report.Row]:
    """All rows of one transport, against a child process that lives as long as this takes.

    Raises TransferFailed, Absent and what ``Places.check`` raises.
    """
    largest = max(case.nbytes for case in todo)
    async with _child(name, str(places.producer_device), largest) as (pipe, secret):
        started = await asyncio.to_thread(_ask, pipe, None, producer.Started, START_S)
        if started.error:
            raise Absent(f"the producer's process: {started.error}")
        timeouts, region = Timeouts(), places.region
        try:
            transports = open_transports(name, region, url="http://127.0.0.1:1", host="127.0.0.1")
        except ConfigError as exc:
            raise Absent(exc.message) from exc

        async def connect(url: str, on_message: OnMessage, on_lost: OnLost) -> Channel:
            return await dial(url, producer.hello, secret, timeouts, None, on_message, on_lost)

        consumer = Consumer(connect, region, transports, timeouts)
        bare, protocol = None, ""
        if isinstance(transport := transports[name], MooncakeTransport):
            bare = BareEngine(transport, region, started.offers[0])
            protocol = transport.protocol
        bench = _Bench(pipe, consumer, places, bare, started)
        try:
            await bench.reach()
            rows = []
            for case in todo:
                times = await bench.times(case, config.repeats, config.seconds)
                rows.append(times.row(name, protocol, case.nbytes, case.pieces))
            if bench.in_place:
                for nbytes in sorted({case.nbytes for case in todo}):
                    times = await bench.times_in_place(nbytes, config.repeats, config.seconds)
                    rows.append(times.row(f"{name}, in place", protocol, nbytes, 1))
            return rows
        finally:
            await consumer.close()
            transport.close()


@asynccontextmanager
async def _child(
    name: TransportName, device: str, nbytes: int
) -> AsyncIterator[tuple[Connection, bytes]]:
    """The producer's process: the pipe to it and the secret of its channel."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    secret = secrets.token_hex(16).encode()
    child = context.Process(target=producer.run, args=(theirs, secret, name, device, nbytes))
    child.start()
    theirs.close()
    try:
        yield pipe, secret
    finally:
        pipe.close()
        await asyncio.to_thread(child.join, JOIN_S)
        child.kill()


def _ask(pipe: Connection, question: wire.Message | None, kind: type[M], limit_s: float) -> M:
    """What the producer's process says. Raises TransferFailed. Blocks."""
    try:
        if question is not None:
            pipe.send_bytes(wire.encode(question))
        if pipe.poll(limit_s):
            return wire.decode(pipe.recv_bytes(), kind)
    except (EOFError, ConnectionError):
        raise TransferFailed("the producer's process has ended") from None
    raise TransferFailed(f"the producer's process said nothing for {limit_s:g} s")


def _rounds(repeats: int, seconds: float) -> Iterator[int]:
    """Numbers of rounds, until there are ``repeats``, or ``seconds`` have passed since the first
    and there are ``LEAST``."""
    begin = time.perf_counter()
    for index in range(repeats):
        if index >= LEAST and time.perf_counter() > begin + seconds:
            return
        yield index


class _Bench:
    """``bare``: where there is one. ``started``: what the producer said of itself."""

    def __init__(
        self, pipe: Connection, consumer: Consumer, places: Places, bare: BareEngine | None,
        started: producer.Started,
    ) -> None:  # fmt: skip
        self._pipe = pipe
        self._consumer = consumer
        self._places = places
        self._bare = bare
        self._started = started
        self.in_place = False
        """Can the producer's memory be used where it is? Known once it is reached."""

    async def reach(self) -> None:
        """Open the channel and choose the transport. Raises Absent when it does not work."""
        try:
            await self._pull(Case(1, 1))
        except TransferFailed as exc:
            raise Absent(exc.message) from exc
        self.in_place = self._consumer.in_place(self._started.url)

    async def times(self, case: Case, repeats: int, seconds: float) -> report.Times:
        """Rounds until there are ``repeats`` or ``seconds`` have passed."""
        times = report.Times()
        await self._checked(case)
        for index in _rounds(repeats, seconds):
            # The engine is warmer for the second, so each is first in every other round.
            bare_first = index % 2 == 1
            if self._bare is not None and bare_first:
                times.bare.append(self._bare.read(self._reads(case)))
            self._places.soil(case.nbytes)
            pull, read = await self._pull(case)
            times.pull.append(pull)
            times.read.append(read)
            times.handoff.append(pull - read)
            if self._bare is not None and not bare_first:
                times.bare.append(self._bare.read(self._reads(case)))
            times.copy.append(self._places.copy(case.nbytes))
        await self._checked(case)
        return times

    async def times_in_place(self, nbytes: int, repeats: int, seconds: float) -> report.Times:
        """As ``times``, of an embedding that stays where it is."""
        times = report.Times()
        await self._borrow(nbytes, look=True)
        for _ in _rounds(repeats, seconds):
            pull, handoff = await self._borrow(nbytes, look=False)
            times.pull.append(pull)
            times.handoff.append(handoff)
        await self._borrow(nbytes, look=True)
        for _ in range(LEAST):  # in turn, they would empty the caches of both processes
            times.copy.append(self._places.copy(nbytes))
        return times

    async def _borrow(self, nbytes: int, *, look: bool) -> tuple[float, float]:
        """Seconds of all of it, and of those until there was a view. ``look``: at every byte."""
        ref = (await self._lend(nbytes, 0)).ref
        assert isinstance(ref, EmbeddingRef)
        begin = time.perf_counter()
        loan = await self._consumer.borrow(ref, producer.HOLDER, Timeouts().embedding)
        handoff = time.perf_counter() - begin
        if look:
            self._places.check_view(loan.memory, nbytes)
        await loan.validate()
        pull = time.perf_counter() - begin
        loan.release()
        return pull, handoff

    async def _checked(self, case: Case) -> None:
        """A round with a look at every byte. Raises TransferFailed."""
        self._places.copy(case.nbytes)
        self._places.clear(case.nbytes)
        await self._pull(case)
        self._places.check(case.nbytes, case.pieces)
        if self._bare is not None:
            self._places.clear(case.nbytes)
            self._bare.read(self._reads(case))
            self._places.check(case.nbytes, case.pieces)

    async def _pull(self, case: Case) -> tuple[float, float]:
        """Seconds of the pull and of the read in it."""
        claim = await self._lend(case.nbytes, case.pieces)
        offsets = self._places.offsets(case.nbytes, case.pieces)
        begin = time.perf_counter()
        pulled = await self._consumer.pull(
            claim.ref,
            producer.HOLDER,
            lambda first, pieces: offsets[first : first + len(pieces)],
            lambda first, count, ready: None,
            Timeouts().kv,
        )
        return time.perf_counter() - begin, pulled.read_s

    async def _lend(self, nbytes: int, pieces: int) -> wire.Claim:
        lend = producer.Lend(nbytes, pieces)
        return await asyncio.to_thread(_ask, self._pipe, lend, wire.Claim, ANSWER_S)

    def _reads(self, case: Case) -> list[Read]:
        size = case.nbytes // case.pieces
        offsets = self._places.offsets(case.nbytes, case.pieces)
        return [Read(self._started.offset + i * size, to, size) for i, to in enumerate(offsets)]
