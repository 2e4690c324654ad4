"""The test's end of the fault tests: child processes to kill and stop, and a slow link to them.

Children are forked from a server process that has imported everything already, so each of them
starts in milliseconds; they are processes like any other, with their own loop, memory and sockets.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from tests.fault.worker import Options, content, run
from tests.transfer_pair import until
from tests.transfer_rig import FAST, SECRET, Puller, bound, hello
from triptych import wire
from triptych.config import Timeouts, TransportName
from triptych.errors import TransferFailed
from triptych.refs import AnyRef
from triptych.transfer.channel import Channel
from triptych.transfer.consumer import Pulled
from triptych.transfer.handshake import dial
from triptych.transfer.pool import Extent, Pool
from triptych.transfer.transports.base import Link, Read

LONG_S = 12.0
"""Nothing here takes so long; a wait that does has failed."""
MIB = 1 << 20
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.fault.worker", "pytest"])


class Actor:
    """A child process (``worker.Actor``) with the router's channel to it."""

    def __init__(self, options: Options) -> None:
        self.pipe, theirs = _forks.Pipe()
        encoded = msgspec.json.encode(options)
        self.process = _forks.Process(target=run, args=(theirs, encoded), daemon=True)
        self.process.start()
        theirs.close()
        self._answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._events: defaultdict[str, asyncio.Queue[dict[str, Any]]] = defaultdict(asyncio.Queue)
        asyncio.get_running_loop().add_reader(self.pipe.fileno(), self._on_word)
        self._router: Channel | None = None

    def _on_word(self) -> None:
        try:
            word: dict[str, Any] = msgspec.json.decode(self.pipe.recv_bytes())
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self.pipe.fileno())
            return
        if word.pop("answer", False):
            self._answers.put_nowait(word)
        else:
            self._events[word.pop("event")].put_nowait(word)

    async def answer(self) -> dict[str, Any]:
        async with asyncio.timeout(LONG_S):
            return await self._answers.get()

    async def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.pipe.send_bytes(msgspec.json.encode({"do": do, **arguments}))
        return await self.answer()

    async def event(self, name: str) -> dict[str, Any]:
        """The next one of this name."""
        async with asyncio.timeout(LONG_S):
            return await self._events[name].get()

    def saw(self, name: str) -> bool:
        """Has such an event come that was not asked for yet?"""
        return not self._events[name].empty()

    async def start(self) -> None:
        where = await self.answer()
        self.url, self.port = where["url"], where["port"]

    async def router(self) -> Channel:
        """The router is the test: it holds leases until they are claimed."""
        if self._router is None:
            url = f"http://127.0.0.1:{self.port}"
            self._router = await dial(
                url, hello, SECRET, FAST, None, lambda *_: None, lambda *_: None
            )
        return self._router

    async def lend(self, nbytes: int, tag: int, request: str = "r1") -> AnyRef:
        holder = (await self.router()).session
        answer = await self.ask("lend", request=request, holder=holder, nbytes=nbytes, tag=tag)
        ref: AnyRef = msgspec.json.decode(answer["ref"], type=AnyRef)
        return ref

    async def ready(self, ref: AnyRef, **lie: int) -> None:
        await self.ask("ready", slot=ref.slot, nbytes=ref.nbytes, **lie)

    async def ready_ref(self, nbytes: int, tag: int, request: str = "r1") -> AnyRef:
        ref = await self.lend(nbytes, tag, request)
        await self.ready(ref)
        return ref

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    async def stop(self) -> None:
        """SIGSTOP, and wait until the process has really stopped."""
        self.signal(signal.SIGSTOP)
        status = f"/proc/{self.process.pid}/stat"
        async with asyncio.timeout(LONG_S):
            while _state(status) != "T":  # noqa: ASYNC110 (the kernel tells nobody but a parent)
                await asyncio.sleep(0.001)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    async def close(self) -> None:
        if self._router is not None:
            await self._router.close()
        asyncio.get_running_loop().remove_reader(self.pipe.fileno())
        self.pipe.close()
        with suppress(ProcessLookupError):
            self.resume()
        await asyncio.to_thread(self.process.join, LONG_S)
        if self.process.is_alive():
            self.process.kill()
            await asyncio.to_thread(self.process.join, LONG_S)
            raise AssertionError("a child did not end by itself")
        self.process.close()


def _state(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read().rsplit(") ", 1)[1][0]


@asynccontextmanager
async def actors(*options: Options) -> AsyncIterator[list[Actor]]:
    """One child for each; all of them are gone at the end, whatever was done to them."""
    async with AsyncExitStack() as stack:
        children = []
        for option in options:
            child = Actor(option)
            stack.push_async_callback(child.close)
            children.append(child)
        for child in children:
            await child.start()
        yield children


class Taker:
    """A consumer in this process that lets refs land as a role does: in a pool, with quarantine."""

    def __init__(self, nbytes: int, transport: TransportName, timeouts: Timeouts = FAST) -> None:
        self.puller = Puller(nbytes, transport, timeouts)
        self.pool = Pool(self.puller.area, nbytes)
        self.landed: list[bytes] = []
        """What a role would publish."""
        self.extents: dict[str, Extent] = {}

    async def pull(self, ref: AnyRef, request: str = "r1", timeout_s: float = LONG_S) -> Pulled:
        extent = self.pool.try_allocate(ref.nbytes)
        assert extent is not None
        self.extents[request] = extent

        def place(first: int, pieces: Sequence[wire.Piece]) -> list[int]:
            return [extent.offset]

        def landed(first: int, count: int, ready: wire.Ready) -> None:
            self.landed.append(bytes(self.puller.region.view(extent.offset, ref.nbytes)))

        try:
            pulled = await self.puller.consumer.pull(ref, request, place, landed, timeout_s)
        except TransferFailed as exc:
            if exc.quarantine_s:
                self.pool.quarantine(extent, exc.quarantine_s)
            raise
        finally:
            self.pool.free(extent)
        return pulled

    def start(self, ref: AnyRef, request: str = "r1") -> asyncio.Task[Pulled]:
        return asyncio.create_task(self.pull(ref, request))

    async def claimed(self) -> None:
        """A channel and a probed transport exist, and a claim has been sent."""
        producers = self.puller.consumer._by_session
        await until(lambda: any(producer.pulls for producer in producers.values()))

    def check(self, *tags: int) -> None:
        """Exactly these embeddings have landed, in this order, whole and right."""
        assert len(self.landed) == len(tags)
        for tag, data in zip(tags, self.landed, strict=True):
            assert data == content(tag, len(data))


@asynccontextmanager
async def taker(
    nbytes: int, transport: TransportName, timeouts: Timeouts = FAST
) -> AsyncIterator[Taker]:
    subject = Taker(nbytes, transport, timeouts)
    try:
        yield subject
    finally:
        await subject.puller.close()


class HalfRead:
    """Makes a link's large reads wait between their first and their second half for ``go``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type[Link]) -> None:
        self._held = threading.Event()
        self._go = threading.Event()
        read = kind.read

        def halves(link: Link, pieces: Sequence[Read], timeout_s: float) -> None:
            (piece,) = pieces
            if piece.nbytes < MIB or self._held.is_set():
                read(link, pieces, timeout_s)
                return
            half = piece.nbytes // 2
            read(link, [piece._replace(nbytes=half)], timeout_s)
            self._held.set()
            assert self._go.wait(LONG_S)
            rest = Read(piece.remote + half, piece.local + half, piece.nbytes - half)
            read(link, [rest], timeout_s)

        monkeypatch.setattr(kind, "read", halves)

    async def held(self) -> None:
        assert await asyncio.to_thread(self._held.wait, LONG_S)

    def go(self) -> None:
        self._go.set()


class SlowLink:
    """A proxy in front of one worker. The channel passes; a transfer's bytes are held up after
    ``hold_after`` of them until ``go``."""

    def __init__(self, hold_after: int) -> None:
        self._listener, self.url = bound()
        self._hold_after = hold_after
        self.port = 0
        """Of the worker behind it."""
        self.held = asyncio.Event()
        self.go = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._on_connection, sock=self._listener)
        try:
            yield
        finally:
            server.close()
            self.go.set()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _on_connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            writer.close()
            return
        first = await reader.read(65536)
        up_writer.write(first)
        limit = self._hold_after if first.startswith(b"GET /transfer") else None
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pass(reader, up_writer, None))
                both.create_task(self._pass(up_reader, writer, limit))
        finally:
            for end in (writer, up_writer):
                end.transport.abort()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int | None
    ) -> None:
        passed = 0
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
                passed += len(data)
                if limit is not None and passed >= limit:
                    self.held.set()
                    await self.go.wait()
            writer.write_eof()


def timeouts(**seconds: float) -> Timeouts:
    return replace(FAST, **seconds)
