"""A consumer is killed or stopped while it holds leases; a lease ends while it reads."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack

import msgspec
import pytest

from tests.fault.actors import MIB, HalfRead, SlowLink, actors, taker, timeouts
from tests.fault.worker import Options
from triptych.config import TransportName
from triptych.errors import Cancelled, TransferFailed
from triptych.refs import AnyRef
from triptych.transfer.transports.shm import ShmLink

SIZE = 4 * MIB
LARGE = 32 * MIB
"""More than sockets hold: a response that is held up is held up at its producer too."""
HUGE = 128 * MIB
"""Not read between two lines of a test."""
BACK_S = 0.2
"""From the end of a consumer's stream to its memory being free at the producer."""
GIVEN_UP_S = 3.0
"""From the loss of a session to the end of its responses: a polite close is tried first."""
LEASE_S = 0.6
EXPIRED_S = LEASE_S + 1.0


def encoded(ref: AnyRef) -> str:
    return msgspec.json.encode(ref).decode()


@pytest.mark.parametrize("transport", ["shm", "http", "mooncake"])
async def test_killed_with_leases_the_producer_has_its_memory_back(
    transport: TransportName,
) -> None:
    """One being read from, one waiting, and some that its router has not even sent yet."""
    options = Options(transport, 4 * SIZE)
    async with actors(options, options) as (producer, consumer):
        waiting = await producer.lend(SIZE, 1)
        done = await producer.ready_ref(SIZE, 2, "r2")
        unclaimed = await producer.lend(SIZE, 3, "r3")
        await consumer.ask("pull", ref=encoded(done), request="r2", timeout_s=60)
        await consumer.event("pulled")
        assert (await producer.event("idle"))["slot"] == done.slot
        for _ in range(3):  # the same slot, lent to three of its requests
            await consumer.ask("pull", ref=encoded(waiting), request="r1", timeout_s=60)
        await consumer.event("failed")
        await consumer.event("failed")  # there is one lease of r1, so one claim is granted
        killed = time.monotonic()
        consumer.kill()
        lost = await producer.event("lost")
        idle = await producer.event("idle")
        assert idle["slot"] == waiting.slot
        assert idle["at"] - killed < BACK_S
        assert idle["at"] - lost["at"] < BACK_S
        assert idle["free"] == 3 * SIZE
        assert (await producer.ask("state"))["leases"] == 1
        assert unclaimed.slot not in (idle["slot"], waiting.slot)


async def test_killed_in_the_middle_of_a_response() -> None:
    """A busy machine may take longer to end a process: one of three times counts."""
    times: list[float] = []
    while not times or (times[-1] >= BACK_S and len(times) < 3):
        times.append(await killed_in_the_middle_of_a_response())
    assert times[-1] < BACK_S, times


async def killed_in_the_middle_of_a_response() -> float:
    """Seconds until the memory was back."""
    slow = SlowLink(hold_after=MIB)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(slow.serve())
        producer, consumer = await stack.enter_async_context(
            actors(Options("http", LARGE, advertised=slow.url), Options("http", LARGE))
        )
        slow.port = producer.port
        ref = await producer.ready_ref(LARGE, 1)
        await consumer.ask("pull", ref=encoded(ref), request="r1", timeout_s=60)
        await slow.held.wait()
        killed = time.monotonic()
        consumer.kill()
        slow.go.set()
        idle = await producer.event("idle")
        back_s: float = idle["at"] - killed
        assert idle["free"] == LARGE
        again = await producer.ready_ref(LARGE, 2)
        async with taker(LARGE, "http") as other:  # the server is none the worse for it
            await other.pull(again)
            other.check(2)
    return back_s


async def test_a_lease_that_expires_during_a_slow_read() -> None:
    """The consumer is stopped in the middle, for longer than its lease; its memory gets another
    tenant; then the read goes on to its end. None of it may be used."""
    slow = SlowLink(hold_after=MIB)
    limits = {"lease": LEASE_S, "transfer": LEASE_S / 2}
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(slow.serve())
        producer, consumer = await stack.enter_async_context(
            actors(
                Options("http", LARGE, advertised=slow.url, timeouts=limits),
                Options("http", LARGE),
            )
        )
        slow.port = producer.port
        ref = await producer.ready_ref(LARGE, 1)
        await consumer.ask("pull", ref=encoded(ref), request="r1", timeout_s=60)
        await slow.held.wait()
        stopped = time.monotonic()
        await consumer.stop()
        idle = await producer.event("idle")
        assert LEASE_S <= idle["at"] - stopped + 0.1 < EXPIRED_S
        assert idle["free"] == LARGE
        consumer.resume()
        slow.go.set()
        failed = await consumer.event("failed")
        assert (failed["error"], failed["reason"]) == ("TransferFailed", "the lease expired")
        assert not consumer.saw("landed")


@pytest.mark.parametrize("why", ["expired", "cancelled"])
async def test_memory_that_got_another_tenant_during_a_copy(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second half of what the copy brings is another tenant's."""
    read = HalfRead(monkeypatch, ShmLink)
    limits = {"lease": LEASE_S, "transfer": LEASE_S / 2}
    mute = timeouts(heartbeat=60.0, silence=120.0) if why == "expired" else timeouts()
    async with (
        actors(Options("shm", SIZE, timeouts=limits)) as (producer,),
        taker(SIZE, "shm", mute) as consumer,
    ):
        pulling = consumer.start(await producer.ready_ref(SIZE, 1))
        await read.held()
        if why == "cancelled":
            await producer.ask("cancel", request="r1")
        idle = await producer.event("idle")
        assert idle["free"] == SIZE
        await producer.ask("state")  # by now the other tenant has written
        read.go()
        error, words = (
            (TransferFailed, "lease expired") if why == "expired" else (Cancelled, "cancelled")
        )
        with pytest.raises(error, match=words):
            await pulling
        assert consumer.landed == []
        # What was withheld would have been wrong indeed.
        brought = bytes(consumer.puller.region.view(consumer.extents["r1"].offset, SIZE))
        assert brought[-MIB:] == b"\xee" * MIB
        assert consumer.pool.free_nbytes == SIZE


async def test_a_stopped_consumer_does_not_hold_its_producer() -> None:
    """It takes no bytes of a response: the response ends with its session, others are served."""
    limits = {"silence": 2.0, "connect": 1.0}
    async with actors(Options("http", HUGE + SIZE, timeouts=limits), Options("http", HUGE)) as (
        producer,
        consumer,
    ):
        ref = await producer.ready_ref(HUGE, 1)
        await consumer.ask("pull", ref=encoded(ref), request="r1", timeout_s=60)
        await consumer.event("placing")
        while not (await producer.ask("state"))["responses"]:  # noqa: ASYNC110 (a process)
            await asyncio.sleep(0)
        await consumer.stop()
        async with taker(SIZE, "http") as other:
            second = await producer.ready_ref(SIZE, 2, "r2")
            await other.pull(second, "r2")
            other.check(2)
        for _ in range(3):
            if (await producer.event("idle"))["slot"] == ref.slot:
                break
        state = await producer.ask("state")
        assert (state["free"], state["leases"]) == (HUGE + SIZE, 0)
        async with asyncio.timeout(GIVEN_UP_S):
            while (await producer.ask("state"))["responses"]:  # noqa: ASYNC110 (a process)
                await asyncio.sleep(0.01)
