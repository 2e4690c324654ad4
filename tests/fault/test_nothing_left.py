"""After many pulls that ended in every way there is, nothing is left of them on either side."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import re
import threading
from pathlib import Path

import pytest

from tests.fault.actors import LONG_S, MIB, Actor, Taker, actors, taker
from tests.fault.worker import Options
from tests.transfer_pair import until
from triptych.config import TransportName
from triptych.errors import TriptychError

SIZE = 2 * MIB
PULLS = 60
LIVES = 4
DRAIN_S = 5.0
"""From the last pull's end to the last lease's."""
TRANSPORTS: list[TransportName] = ["shm", "http", "mooncake"]


def held() -> tuple[int, int, int]:
    """Of this process: descriptors, threads that move bytes, regions of others."""
    gc.collect()
    threads = [t for t in threading.enumerate() if t.name.startswith("transfer")]
    maps = re.findall(r"r--s .*memfd:triptych", Path("/proc/self/maps").read_text("utf-8"))
    return len(os.listdir("/proc/self/fd")), len(threads), len(maps)


async def drained(producer: Actor, nbytes: int) -> None:
    async with asyncio.timeout(DRAIN_S):
        while (state := await producer.ask("state"))["free"] != nbytes:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (state["leases"], state["responses"]) == (0, 0)


async def one(producer: Actor, consumer: Taker, number: int, draw: random.Random) -> bool:
    """One pull, ended by itself, by the consumer, by the router, or before it began."""
    request = f"r{number}"
    ref = await producer.lend(SIZE, number, request)
    pulling = consumer.start(ref, request)
    end = draw.choice(["by itself", "by itself", "cancelled here", "cancelled there", "early"])
    if end != "early":
        await producer.ready(ref)
    await asyncio.sleep(draw.random() * 0.01)
    if end in ("cancelled here", "early"):
        pulling.cancel()
    elif end == "cancelled there":
        await producer.ask("cancel", request=request)
    done, _ = await asyncio.wait({pulling}, timeout=LONG_S)
    assert done
    if end == "early":  # perhaps before it could claim: the lease is the router's to drop then
        await producer.ask("cancel", request=request)
    return not pulling.cancelled() and pulling.exception() is None


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_every_end_of_a_pull_gives_everything_back(transport: TransportName) -> None:
    draw = random.Random(transport)
    async with (
        actors(Options(transport, 8 * SIZE)) as (producer,),
        taker(8 * SIZE, transport) as consumer,
    ):
        # With the channel open a pull claims at once; one that is cancelled before it could claim
        # leaves the lease to the router, which nobody plays here.
        await consumer.pull(await producer.ready_ref(SIZE, PULLS, "r"), "r")
        came = [number for number in range(PULLS) if await one(producer, consumer, number, draw)]
        assert PULLS / 10 < len(came) < PULLS
        consumer.check(PULLS, *came)
        await drained(producer, 8 * SIZE)
        assert consumer.pool.free_nbytes == 8 * SIZE
        assert not next(iter(consumer.puller.consumer._by_session.values())).pulls


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_producers_many_lives_leave_nothing_in_its_consumer(
    transport: TransportName,
) -> None:
    async with taker(8 * SIZE, transport) as consumer:
        port, before = 0, (0, 0, 0)
        for life in range(LIVES):
            async with actors(Options(transport, 8 * SIZE, port=port)) as (producer,):
                port = producer.port
                await consumer.pull(await producer.ready_ref(SIZE, life, "r1"))
                waiting = consumer.start(await producer.lend(SIZE, life, "r2"), "r2")
                await until(lambda: len(consumer.puller.dialled) == life + 1)  # noqa: B023
                producer.kill()
                with pytest.raises(TriptychError):
                    await waiting
            await until(lambda: not consumer.puller.consumer._producers)
            if life == 0:
                before = held()
        # Threads end, sockets close and mappings go a moment after the pull's error.
        if transport == "mooncake":  # the engine keeps connections of its own
            await until(lambda: held()[1:] <= before[1:])
        else:
            await until(lambda: all(now <= then for now, then in zip(held(), before, strict=True)))
        consumer.check(*range(LIVES))
