"""A producer is killed, or stopped and resumed, while somebody reads from it."""

from __future__ import annotations

import asyncio
import re
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.fault.actors import LONG_S, MIB, HalfRead, SlowLink, actors, taker, timeouts
from tests.fault.worker import Options
from tests.transfer_pair import until
from triptych.config import TransportName
from triptych.errors import TransferFailed, WorkerLost
from triptych.transfer.transports.base import Link
from triptych.transfer.transports.mooncake import _QUARANTINE_S, MooncakeLink
from triptych.transfer.transports.shm import ShmLink

SIZE = 8 * MIB
NOTICED_S = 1.0
"""From a kill to the pull's error. The kernel's end-of-stream takes well under a millisecond."""
SILENCE_S = 0.6
NOTICED_SILENT_S = SILENCE_S + 1.0
"""From a stop to the pull's error: the silence, seen twice a heartbeat apart, and some room."""
TRANSPORTS: list[TransportName] = ["shm", "http", "mooncake"]
LINKS: list[tuple[TransportName, type[Link]]] = [("shm", ShmLink), ("mooncake", MooncakeLink)]


def mapped() -> int:
    """Regions of processes that are mapped here."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    return len(re.findall(r"rw-p .*memfd:triptych", maps))


def left_in_tmp() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("triptych-*/region"))


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_killed_before_anything_is_ready(transport: TransportName) -> None:
    async with (
        actors(Options(transport, SIZE)) as (producer,),
        taker(SIZE, transport) as consumer,
    ):
        before = mapped()
        pulling = consumer.start(await producer.lend(SIZE, 1))
        await consumer.claimed()
        start = time.monotonic()
        producer.kill()
        with pytest.raises(WorkerLost):
            await pulling
        assert time.monotonic() - start < NOTICED_S
        assert consumer.landed == []
        assert consumer.pool.free_nbytes == SIZE  # nothing was read: nothing to keep away from
        await until(lambda: mapped() == before)  # nor is the dead process's memory kept alive


@pytest.mark.parametrize(("transport", "link"), LINKS)
async def test_killed_in_the_middle_of_a_read(
    transport: TransportName, link: type[Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = HalfRead(monkeypatch, link)
    async with (
        actors(Options(transport, SIZE)) as (producer,),
        taker(SIZE, transport) as consumer,
    ):
        pulling = consumer.start(await producer.ready_ref(SIZE, 1))
        await read.held()
        if transport == "mooncake":
            await producer.stop()  # so that the engine waits for bytes when it is killed
            read.go()
            done, _ = await asyncio.wait({pulling}, timeout=0.3)
            assert not done
        start = time.monotonic()
        producer.kill()
        await asyncio.to_thread(producer.process.join, LONG_S)
        read.go()
        with pytest.raises(TransferFailed if transport == "mooncake" else WorkerLost) as caught:
            await pulling
        assert time.monotonic() - start < NOTICED_S
        assert consumer.landed == []
        # The engine may still write what it has received; a copy has ended when it has ended.
        quarantined = SIZE if transport == "mooncake" else 0
        assert consumer.pool.quarantined_nbytes == quarantined
        assert consumer.pool.free_nbytes == SIZE - quarantined
        assert getattr(caught.value, "quarantine_s", 0) == (_QUARANTINE_S if quarantined else 0)


async def test_killed_in_the_middle_of_a_response() -> None:
    slow = SlowLink(hold_after=MIB)
    async with (
        slow.serve(),
        actors(Options("http", SIZE, advertised=slow.url)) as (producer,),
        taker(SIZE, "http") as consumer,
    ):
        slow.port = producer.port
        pulling = consumer.start(await producer.ready_ref(SIZE, 1))
        await slow.held.wait()
        start = time.monotonic()
        producer.kill()
        with pytest.raises((TransferFailed, WorkerLost)):  # whichever connection is seen first
            await pulling
        assert time.monotonic() - start < NOTICED_S
        assert consumer.landed == []
        assert consumer.pool.free_nbytes == SIZE


@pytest.mark.parametrize(("transport", "link"), LINKS)
@pytest.mark.parametrize("resumed", ["in time", "too late"])
async def test_stopped_in_the_middle_of_a_read(
    transport: TransportName, link: type[Link], resumed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = HalfRead(monkeypatch, link)
    limits = timeouts(silence=SILENCE_S if resumed == "too late" else LONG_S)
    async with (
        actors(Options(transport, SIZE)) as (producer,),
        taker(SIZE, transport, limits) as consumer,
    ):
        ref = await producer.ready_ref(SIZE, 1)
        pulling = consumer.start(ref)
        await read.held()
        await producer.stop()
        read.go()
        if resumed == "in time":
            done, _ = await asyncio.wait({pulling}, timeout=0.3)
            assert not done  # read or not, it is not valid before the producer says so
            producer.resume()
            await pulling
            consumer.check(1)
            assert (await producer.event("idle"))["slot"] == ref.slot
            return
        async with asyncio.timeout(NOTICED_SILENT_S):
            with pytest.raises((WorkerLost, TransferFailed)):
                await pulling
        await nothing_lands_any_more(producer, consumer)
        assert consumer.pool.quarantined_nbytes == (SIZE if transport == "mooncake" else 0)


@pytest.mark.parametrize("resumed", ["in time", "too late"])
async def test_stopped_in_the_middle_of_a_response(resumed: str) -> None:
    slow = SlowLink(hold_after=MIB)
    limits = timeouts(silence=SILENCE_S if resumed == "too late" else LONG_S)
    size = 32 * MIB  # more than sockets hold
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(slow.serve())
        options = Options("http", size, advertised=slow.url)
        (producer,) = await stack.enter_async_context(actors(options))
        consumer = await stack.enter_async_context(taker(size, "http", limits))
        slow.port = producer.port
        pulling = consumer.start(await producer.ready_ref(size, 1))
        await slow.held.wait()
        await producer.stop()
        slow.go.set()
        if resumed == "in time":
            done, _ = await asyncio.wait({pulling}, timeout=0.3)
            assert not done
            producer.resume()
            await pulling
            consumer.check(1)
            return
        async with asyncio.timeout(NOTICED_SILENT_S):
            with pytest.raises((WorkerLost, TransferFailed)):
                await pulling
        assert consumer.pool.free_nbytes == size  # nobody but us writes there
        await nothing_lands_any_more(producer, consumer)


async def nothing_lands_any_more(producer, consumer) -> None:  # type: ignore[no-untyped-def]
    """Whoever gets the destination next keeps what he writes, whatever the producer does."""
    assert consumer.landed == []
    free = consumer.pool.try_allocate(consumer.pool.free_nbytes or SIZE)
    if free is None:  # all of it is in quarantine: nobody gets it
        producer.resume()
        await producer.event("idle")
        assert consumer.pool.free_nbytes == 0
        return
    view = consumer.puller.region.view(free.offset, free.nbytes)
    view[:] = bytes([7]) * free.nbytes
    producer.resume()
    await producer.event("idle")  # it has noticed that its consumer is gone
    assert bytes(view) == bytes([7]) * free.nbytes


async def test_held_up_for_longer_than_a_lease_the_producer_keeps_its_promises() -> None:
    """Its own event loop was busy; the consumer's heartbeats are there, only unread."""
    lease_s = 0.4
    limits = {"lease": lease_s, "transfer": 0.2}
    async with (
        actors(Options("shm", 2 * SIZE, timeouts=limits)) as (producer,),
        taker(SIZE, "shm") as consumer,
    ):
        ref = await producer.lend(SIZE, 1)
        other = await producer.lend(8, 2, "r2")
        await producer.ask("block", seconds=3 * lease_s)
        pulling = consumer.start(ref)
        await consumer.claimed()
        await producer.ask("block", seconds=3 * lease_s)
        await producer.ready(ref)
        await pulling
        consumer.check(1)
        assert (await producer.event("idle"))["slot"] == ref.slot
        assert (await producer.ask("state"))["leases"] == 1
        assert not producer.saw("idle")
        assert other.slot != ref.slot


async def test_a_killed_producer_leaves_no_file_behind() -> None:
    before = left_in_tmp()
    async with actors(Options("shm", SIZE)) as (producer,), taker(SIZE, "shm") as consumer:
        await consumer.pull(await producer.ready_ref(SIZE, 1))
        producer.kill()
        await asyncio.to_thread(producer.process.join, LONG_S)
        consumer.check(1)
        assert left_in_tmp() == before


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_one_that_came_back_on_the_same_address_refuses_old_refs(
    transport: TransportName,
) -> None:
    async with taker(SIZE, transport) as consumer:
        async with actors(Options(transport, 2 * SIZE)) as (producer,):
            await consumer.pull(await producer.ready_ref(SIZE, 1))
            old = await producer.lend(SIZE, 2)
            port = producer.port
            producer.kill()
        async with actors(Options(transport, 2 * SIZE, port=port)) as (again,):
            await again.lend(1, 2)
            new = await again.ready_ref(SIZE, 3)
            assert (new.owner, new.slot) == (old.owner, old.slot)
            with pytest.raises((WorkerLost, TransferFailed)):
                await consumer.pull(old)
            with pytest.raises(WorkerLost, match="process that is gone"):
                await consumer.pull(old)
            await consumer.pull(new)
            consumer.check(1, 3)
