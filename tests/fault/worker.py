"""What a child process of the fault tests does: lends memory, pulls refs, and says what happens.

Commands come in and answers and events go out as JSON, over the pipe that ``actors`` holds the
other end of. Everything below the commands is the real thing: region, pool, producer and consumer
on a uvicorn server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import numpy as np

from tests.transfer_rig import FAST, Puller, Worker
from triptych import wire
from triptych.config import TransportName
from triptych.errors import BadMedia, TriptychError
from triptych.refs import AnyRef
from triptych.transfer.channel import Channel
from triptych.transfer.pool import Extent, Pool

NEXT_TENANT = 0xEE
"""What memory is filled with as soon as it is given back: whoever still reads it, reads this."""


class Options(msgspec.Struct):
    transport: TransportName = "auto"
    nbytes: int = 1 << 20
    port: int = 0
    advertised: str | None = None
    timeouts: dict[str, float] = {}


def content(tag: int, nbytes: int) -> bytes:
    """The bytes of an embedding; none of them alike in two tags."""
    return np.random.default_rng(tag).bytes(nbytes)


class _Worker(Worker):
    def __init__(self, say: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.say = say

    def on_lost(self, channel: Channel, reason: str) -> None:
        super().on_lost(channel, reason)
        self.say(event="lost", reason=reason)


class Actor:
    """One child: a producer with a pool, and a consumer once it is asked to pull."""

    def __init__(self, pipe: Connection, options: Options) -> None:
        self.pipe = pipe
        self.options = options
        self.timeouts = replace(FAST, **options.timeouts)
        self.worker = _Worker(
            self.say,
            options.nbytes,
            options.transport,
            self.timeouts,
            port=options.port,
            advertised=options.advertised,
        )
        self.pool = Pool(self.worker.region.carve(options.nbytes), options.nbytes)
        self.worker.producer._on_idle = self.on_idle
        self.extents: dict[int, Extent] = {}
        self.tags: dict[int, int] = {}
        self.puller: Puller | None = None
        self.pulls: set[asyncio.Task[None]] = set()
        self.ended = asyncio.Event()

    def say(self, **words: Any) -> None:
        with suppress(BrokenPipeError):  # the test is over
            self.pipe.send_bytes(msgspec.json.encode({**words, "at": time.monotonic()}))

    def on_idle(self, slot: int) -> None:
        """As a role does: the memory has another tenant at once."""
        self.worker.producer.close_slot(slot)
        extent = self.extents.pop(slot)
        self.pool.free(extent)
        view = self.worker.region.view(extent.offset, extent.nbytes)
        self.say(event="idle", slot=slot, free=self.pool.free_nbytes)
        np.frombuffer(view, dtype=np.uint8).fill(NEXT_TENANT)

    def on_command(self) -> None:
        try:
            command: dict[str, Any] = msgspec.json.decode(self.pipe.recv_bytes())
        except (EOFError, OSError):
            self.ended.set()
            return
        answer = getattr(self, command.pop("do"))(**command) or {}
        self.say(answer=True, **answer)

    # ------------------------------------------------------------------ commands

    def lend(self, request: str, holder: str, nbytes: int, tag: int) -> dict[str, Any]:
        extent = self.pool.try_allocate(nbytes)
        assert extent is not None
        ref = self.worker.producer.lend_embedding(
            wire.Piece(extent.offset, nbytes),
            "key",
            "uint8",
            (1, 1, nbytes),
            holder=holder,
            request_id=request,
        )
        self.extents[ref.slot], self.tags[ref.slot] = extent, tag
        return {"ref": msgspec.json.encode(ref).decode()}

    def ready(self, slot: int, nbytes: int, offset: int | None = None) -> None:
        """``offset``: lie about where the bytes are."""
        start = self.extents[slot].offset
        self.worker.region.view(start, nbytes)[:] = content(self.tags[slot], nbytes)
        piece = wire.Piece(start if offset is None else offset, nbytes)
        self.worker.producer.ready(slot, [piece], last=True)

    def lend_again(self, slot: int, request: str, holder: str) -> None:
        self.worker.producer.lend_again(slot, holder=holder, request_id=request)

    def fail(self, slot: int) -> None:
        self.worker.producer.fail(slot, BadMedia("failed on purpose"))

    def cancel(self, request: str) -> None:
        self.worker.producer.cancel(request)

    def block(self, seconds: float) -> None:
        """Hold the event loop up, as nothing should but something will."""
        time.sleep(seconds)

    def state(self) -> dict[str, Any]:
        responses = [
            task
            for task in asyncio.all_tasks()
            if getattr(task.get_coro(), "__qualname__", "") == "RequestResponseCycle.run_asgi"
        ]
        return {
            "free": self.pool.free_nbytes,
            "leases": self.worker.producer.n_leases,
            "responses": len(responses),
        }

    def pull(self, ref: str, request: str, timeout_s: float) -> None:
        if self.puller is None:
            self.puller = Puller(self.options.nbytes, self.options.transport, self.timeouts)
        known = msgspec.json.decode(ref, type=AnyRef)
        task = asyncio.create_task(self._pull(self.puller, known, request, timeout_s))
        self.pulls.add(task)
        task.add_done_callback(self.pulls.discard)

    async def _pull(self, puller: Puller, ref: AnyRef, request: str, timeout_s: float) -> None:
        def place(first: int, pieces: Any) -> list[int]:
            self.say(event="placing", request=request)
            return [puller.area]

        def landed(first: int, count: int, ready: wire.Ready) -> None:
            self.say(event="landed", request=request)

        try:
            await puller.consumer.pull(ref, request, place, landed, timeout_s)
            self.say(event="pulled", request=request)
        except TriptychError as exc:
            self.say(event="failed", error=type(exc).__name__, reason=exc.message)

    # ------------------------------------------------------------------ life

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        async with self.worker.serve():
            self.say(answer=True, url=self.worker.url, port=self.worker.socket.getsockname()[1])
            loop.add_reader(self.pipe.fileno(), self.on_command)
            await self.ended.wait()
            loop.remove_reader(self.pipe.fileno())
            for task in self.pulls:
                task.cancel()
            if self.puller is not None:
                await self.puller.close()


def run(pipe: Connection, options: bytes) -> None:
    """The child's main function."""

    async def main() -> None:
        await Actor(pipe, msgspec.json.decode(options, type=Options)).run()

    asyncio.run(main())
