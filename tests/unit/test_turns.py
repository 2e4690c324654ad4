"""A burst of requests to a worker leaves the event loop time for others in between."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from triptych import wire
from triptych.encoder.server import EncoderWorker
from triptych.stage.http import Turns

N = 12


async def test_one_at_a_time_in_order() -> None:
    turns, rounds, seen = Turns(), [0], []

    async def ask(number: int) -> None:
        await turns.take()
        seen.append((number, rounds[0]))

    async def count() -> None:
        while len(seen) < N:
            rounds[0] += 1
            await asyncio.sleep(0)

    await asyncio.gather(count(), *(ask(number) for number in range(N)))
    assert [number for number, _ in seen] == list(range(N))
    assert len({at for _, at in seen}) == N, "the loop came round between any two"


async def test_one_that_gives_up_keeps_nobody_waiting() -> None:
    turns = Turns()
    first, second, third = (asyncio.create_task(turns.take()) for _ in range(3))
    await asyncio.sleep(0)
    first.cancel()
    second.cancel()
    async with asyncio.timeout(5):
        await third
    assert first.cancelled() and second.cancelled()


async def test_an_encoder_handles_a_burst_one_a_round() -> None:
    """Its requests all lie in their sockets when the loop looks."""
    rounds, handled = [0], []

    class Service:
        async def encode(self, message: wire.EncodeRequest, session: str) -> wire.EncodeResponse:
            handled.append((message.request_id, rounds[0]))
            return wire.EncodeResponse(())

    async def count() -> None:
        while len(handled) < N:
            rounds[0] += 1
            await asyncio.sleep(0)

    worker: Any = SimpleNamespace(_turns=Turns(), service=Service())
    channel: Any = SimpleNamespace(session="s")
    burst = [wire.EncodeRequest(str(n), (), images_in_request=0) for n in range(N)]
    async with asyncio.timeout(20):
        await asyncio.gather(
            count(), *(EncoderWorker.encode(worker, message, channel) for message in burst)
        )
    assert [name for name, _ in handled] == [str(n) for n in range(N)]
    assert len({at for _, at in handled}) == N
