"""A peer that has stopped holds up nobody but those who wait for it."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.fault.actors import LONG_S, MIB, HalfRead, Taker, actors, taker, timeouts
from tests.fault.worker import Options
from triptych.config import TransportName
from triptych.errors import TriptychError
from triptych.refs import AnyRef
from triptych.transfer.transports.base import Link
from triptych.transfer.transports.http import HttpLink
from triptych.transfer.transports.mooncake import MooncakeLink
from triptych.transfer.transports.shm import ShmLink

SIZE = 4 * MIB
HEALTHY_S = 1.0
"""One pull from a healthy producer, alone some 20 ms."""
LINKS: list[tuple[TransportName, type[Link]]] = [
    ("shm", ShmLink), ("http", HttpLink), ("mooncake", MooncakeLink),
]  # fmt: skip


async def healthy(consumer: Taker, refs: list[AnyRef]) -> None:
    for index, ref in enumerate(refs):
        start = time.monotonic()
        await consumer.pull(ref, f"h{index}")
        assert time.monotonic() - start < HEALTHY_S


@pytest.mark.parametrize(("transport", "link"), LINKS)
async def test_stopped_in_the_middle_of_a_read(
    transport: TransportName, link: type[Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    if transport != "http":  # there whole pieces are served only; it stops just before the read
        read = HalfRead(monkeypatch, link)
    options = Options(transport, 8 * SIZE)
    async with (
        actors(options, options) as (stopped, good),
        taker(8 * SIZE, transport, timeouts(silence=LONG_S)) as consumer,
    ):
        await consumer.pull(await stopped.ready_ref(8, 0))  # both are linked
        refs = [await good.ready_ref(SIZE, tag, f"h{tag - 1}") for tag in range(1, 4)]
        ref = await stopped.ready_ref(SIZE, 9)
        if transport == "http":
            await stopped.stop()
            pulling = consumer.start(ref)
        else:
            pulling = consumer.start(ref)
            await read.held()
            await stopped.stop()
            if transport == "mooncake":
                read.go()
        await healthy(consumer, refs)
        assert not pulling.done()
        if transport != "http":
            read.go()
        stopped.resume()
        await pulling
        consumer.check(0, 1, 2, 3, 9)


@pytest.mark.parametrize("transport", ["shm", "http", "mooncake"])
async def test_stopped_before_the_first_contact(transport: TransportName) -> None:
    """The handshake ends by its own timeout; nothing of it is on a thread that others need."""
    options = Options(transport, 4 * SIZE)
    async with (
        actors(options, options) as (stopped, good),
        taker(4 * SIZE, transport, timeouts(handshake=1.0, connect=1.0)) as consumer,
    ):
        refs = [await good.ready_ref(SIZE, tag, f"h{tag - 1}") for tag in range(1, 4)]
        ref = await stopped.ready_ref(SIZE, 9)
        await stopped.stop()
        pulling = consumer.start(ref)
        await healthy(consumer, refs)
        with pytest.raises(TriptychError):
            await pulling
        stopped.resume()
        consumer.check(1, 2, 3)
        again = await stopped.ready_ref(SIZE, 4, "again")
        await consumer.pull(again, "again")
        consumer.check(1, 2, 3, 4)


async def test_stopped_between_hello_and_probe() -> None:
    """Over http the probe is a request like any other, and as patient."""
    options = Options("http", 4 * SIZE)
    async with (
        actors(options, options) as (stopped, good),
        taker(4 * SIZE, "http") as consumer,
    ):
        refs = [await good.ready_ref(SIZE, tag, f"h{tag - 1}") for tag in range(1, 4)]
        ref = await stopped.ready_ref(SIZE, 9)
        dial, dialled = consumer.puller.consumer._dialer, asyncio.Event()

        async def dial_and_stop(url: str, *rest: object) -> object:
            channel = await dial(url, *rest)  # type: ignore[arg-type]
            if url == stopped.url:
                await stopped.stop()
                dialled.set()
            return channel

        consumer.puller.consumer._dialer = dial_and_stop  # type: ignore[assignment]
        pulling = consumer.start(ref)
        await dialled.wait()
        await healthy(consumer, refs)
        assert not pulling.done()
        stopped.resume()
        await pulling
        consumer.check(1, 2, 3, 9)
