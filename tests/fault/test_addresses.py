"""Addresses that are nobody's: out of a region, not registered, not what was offered."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import pytest

from tests.fault.actors import MIB, Actor, Taker, actors, taker
from tests.fault.worker import Options
from triptych import wire
from triptych.config import TransportName
from triptych.errors import TransferFailed

SIZE = MIB
TRANSPORTS: list[TransportName] = ["shm", "http", "mooncake"]


async def still_serves(producer: Actor, transport: TransportName) -> None:
    """Whatever was asked of it, the next one is served."""
    ref = await producer.ready_ref(SIZE, 7, "r7")
    async with taker(SIZE, transport) as consumer:
        await consumer.pull(ref, "r7")
        consumer.check(7)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("offset", [1 << 40, 4 * SIZE, (1 << 63) - 1, -4096])
async def test_a_piece_that_is_outside_the_producers_region(
    transport: TransportName, offset: int
) -> None:
    async with (
        actors(Options(transport, 3 * SIZE)) as (producer,),
        taker(SIZE, transport) as consumer,
    ):
        ref = await producer.lend(SIZE, 1)
        await producer.ready(ref, offset=offset)
        with pytest.raises(TransferFailed, match="outside the peer's"):
            await consumer.pull(ref)
        assert consumer.landed == []
        assert consumer.pool.free_nbytes == SIZE
        assert (await producer.event("idle"))["slot"] == ref.slot
        await still_serves(producer, transport)


def lie(consumer: Taker, change: Callable[[wire.TransportOffer], wire.TransportOffer]) -> None:
    """Let the consumer believe in another offer than the producer's."""
    for transport in consumer.puller.transports.values():
        connect = transport.connect

        def connect_elsewhere(offer: Any, *rest: Any, connect: Any = connect) -> Any:
            return connect(change(offer), *rest)

        transport.connect = connect_elsewhere  # type: ignore[method-assign]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_region_that_is_said_to_be_larger_than_it_is(transport: TransportName) -> None:
    """Now it is the producer's side that must refuse: its memory ends where it ends."""
    async with (
        actors(Options(transport, 3 * SIZE)) as (producer,),
        taker(SIZE, transport) as consumer,
    ):
        lie(consumer, partial(msgspec.structs.replace, nbytes=1 << 50))
        ref = await producer.lend(SIZE, 1)
        await producer.ready(ref, offset=64 * MIB)
        refused = {
            "shm": "not the region offered",
            "http": "ended early|403|500|reset|disconnected",
            "mooncake": "the engine ended a read with status|cannot be reached",
        }
        with pytest.raises(TransferFailed, match=refused[transport]):
            await consumer.pull(ref)
        assert consumer.landed == []
        await still_serves(producer, transport)


async def test_an_engine_reads_registered_memory_only() -> None:
    async with (
        actors(Options("mooncake", 3 * SIZE)) as (producer,),
        taker(SIZE, "mooncake") as consumer,
    ):
        lie(consumer, lambda offer: msgspec.structs.replace(offer, base=offer.base - (1 << 30)))
        ref = await producer.ready_ref(SIZE, 1)
        with pytest.raises(TransferFailed, match="no transport"):  # the probe finds out
            await consumer.pull(ref)
        assert consumer.landed == []
        await still_serves(producer, "mooncake")
