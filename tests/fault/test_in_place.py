"""Memory that is used where its producer has it, when the producer or the lease ends meanwhile."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.fault.actors import MIB, Actor, Options, Taker, actors, taker, timeouts
from tests.fault.test_producer_ends import mapped
from tests.fault.worker import NEXT_TENANT, content
from triptych.errors import (
    BadMedia,
    Cancelled,
    DeadlineExceeded,
    TransferFailed,
    TriptychError,
    WorkerLost,
)
from triptych.refs import AnyRef, EmbeddingRef
from triptych.transfer.pull import Loan

SIZE = 4 * MIB
LEASE_S = 1.0
LIMITS = {"lease": LEASE_S, "transfer": LEASE_S / 2}
BORROW_S = 5.0
GIVEN_UP_S = 3.0


async def borrow(consumer: Taker, ref: AnyRef, request: str = "r1") -> Loan:
    assert isinstance(ref, EmbeddingRef)
    return await consumer.puller.consumer.borrow(ref, request, BORROW_S)


def seen(loan: Loan) -> bytes:
    return loan.memory.numpy().tobytes()


async def given_back(producer: Actor) -> None:
    state = await producer.ask("state")
    while state["leases"]:
        state = await producer.ask("state")
    assert state["free"] == SIZE


async def test_used_where_it_is_and_given_back() -> None:
    async with actors(Options("shm", SIZE)) as (producer,), taker(SIZE, "shm") as consumer:
        before = consumer.pool.free_nbytes
        loan = await borrow(consumer, await producer.ready_ref(SIZE, 1))
        assert seen(loan) == content(1, SIZE)
        await asyncio.gather(loan.validate(), loan.validate())
        await loan.validate()
        assert consumer.pool.free_nbytes == before
        loan.release()
        loan.release()
        await producer.event("idle")
        await given_back(producer)
        with pytest.raises(TransferFailed, match="not lent any more"):
            await loan.validate()


async def test_writing_to_it_by_mistake_reaches_nobody_else() -> None:
    async with actors(Options("shm", SIZE)) as (producer,), taker(SIZE, "shm") as consumer:
        ref = await producer.ready_ref(SIZE, 1)
        loan = await borrow(consumer, ref)
        loan.memory[:100] = 0
        async with taker(SIZE, "shm") as other:
            await other.puller.consumer.opens_in_place(ref.owner, BORROW_S)
            (theirs,) = other.puller.consumer._by_session.values()
            assert theirs.link.memory is not None
            offset = loan.memory.storage_offset()
            assert bytes(theirs.link.memory[offset : offset + 100]) == content(1, SIZE)[:100]
        loan.release()


@pytest.mark.parametrize("why", ["expired", "cancelled"])
async def test_memory_that_got_another_tenant_while_it_was_used(why: str) -> None:
    """What is seen then is not the embedding, and validation says so."""
    mute = timeouts(heartbeat=60.0, silence=120.0) if why == "expired" else timeouts()
    async with (
        actors(Options("shm", SIZE, timeouts=LIMITS)) as (producer,),
        taker(SIZE, "shm", mute) as consumer,
    ):
        ref = await producer.ready_ref(SIZE, 1)
        loan = await borrow(consumer, ref)
        if why == "cancelled":
            await producer.ask("cancel", request="r1")
        await producer.event("idle")
        await producer.ask("state")  # by now the other tenant has written
        assert seen(loan) == bytes([NEXT_TENANT]) * SIZE
        error, words = (
            (TransferFailed, "lease expired") if why == "expired" else (Cancelled, "cancelled")
        )
        for _ in range(2):
            with pytest.raises(error, match=words):
                await loan.validate()
        loan.release()
        with pytest.raises(TransferFailed, match="has expired"):
            await borrow(consumer, ref)  # the slot itself is gone
        await given_back(producer)


async def test_a_lease_that_lapsed_is_had_again_while_the_slot_is_there() -> None:
    """Another request keeps the slot, as an encoder's cache does."""
    mute = timeouts(heartbeat=60.0, silence=120.0)
    async with (
        actors(Options("shm", SIZE, timeouts=LIMITS)) as (producer,),
        taker(SIZE, "shm", mute) as consumer,
        taker(SIZE, "shm") as other,
    ):
        ref = await producer.ready_ref(SIZE, 1)
        await producer.ask("lend_again", slot=ref.slot, request="r2", holder="nobody")
        keeping = await borrow(other, ref, "r1")
        loan = await borrow(consumer, ref, "r2")
        with pytest.raises(TransferFailed, match="lease expired"):
            await asyncio.sleep(2 * LEASE_S)
            await loan.validate()
        again = await borrow(consumer, ref, "r2")
        await again.validate()
        assert seen(again) == content(1, SIZE)
        again.release()
        keeping.release()
        await given_back(producer)


async def test_a_killed_producers_memory_stays_mapped_until_it_is_given_back() -> None:
    async with actors(Options("shm", SIZE)) as (producer,), taker(SIZE, "shm") as consumer:
        loan = await borrow(consumer, await producer.ready_ref(SIZE, 1))
        producer.kill()
        with pytest.raises(WorkerLost):
            await loan.validate()
        assert seen(loan) == content(1, SIZE)  # no SIGBUS, and nobody writes there any more
        assert mapped() == 1
        loan.release()
        del loan
        assert mapped() == 0


async def test_a_stopped_producer_is_waited_for_no_longer_than_allowed() -> None:
    short = timeouts(rpc=0.5)
    async with actors(Options("shm", SIZE)) as (producer,), taker(SIZE, "shm", short) as consumer:
        loan = await borrow(consumer, await producer.ready_ref(SIZE, 1))
        await producer.stop()
        began = time.monotonic()
        with pytest.raises((DeadlineExceeded, WorkerLost)):
            await loan.validate()
        assert time.monotonic() - began < GIVEN_UP_S
        loan.release()
        producer.resume()
        await given_back(producer)


async def test_an_embedding_that_fails_before_it_is_ready() -> None:
    async with actors(Options("shm", SIZE)) as (producer,), taker(SIZE, "shm") as consumer:
        ref = await producer.lend(SIZE, 1)
        waiting = asyncio.create_task(borrow(consumer, ref))
        await consumer.claimed()
        await producer.ask("fail", slot=ref.slot)
        with pytest.raises(BadMedia, match="on purpose"):
            await waiting
        await given_back(producer)


async def test_who_stops_waiting_gives_the_lease_back() -> None:
    async with actors(Options("shm", SIZE)) as (producer,), taker(SIZE, "shm") as consumer:
        ref = await producer.lend(SIZE, 1)
        waiting = asyncio.create_task(borrow(consumer, ref))
        await consumer.claimed()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await given_back(producer)
        (theirs,) = consumer.puller.consumer._by_session.values()
        assert theirs.pulls == {}


@pytest.mark.parametrize("transport", ["http", "mooncake"])
async def test_where_bytes_must_move_nothing_is_used_in_place(transport: str) -> None:
    options = Options(transport, SIZE)  # type: ignore[arg-type]
    async with actors(options) as (producer,), taker(SIZE, transport) as consumer:  # type: ignore[arg-type]
        ref = await producer.ready_ref(SIZE, 1)
        assert not consumer.puller.consumer.in_place(ref.owner)
        assert not await consumer.puller.consumer.opens_in_place(ref.owner, BORROW_S)
        with pytest.raises(TransferFailed, match="cannot be used in place"):
            await borrow(consumer, ref)


async def test_a_piece_that_is_outside_the_producers_region() -> None:
    async with actors(Options("shm", SIZE)) as (producer,), taker(SIZE, "shm") as consumer:
        ref = await producer.lend(SIZE, 1)
        await producer.ready(ref, offset=SIZE)
        with pytest.raises(TriptychError, match="outside"):
            await borrow(consumer, ref)
