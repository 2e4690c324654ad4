"""A burst of requests to a worker leaves the event loop time for others in between."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest
from starlette.applications import Starlette

from triptych import wire
from triptych.stage.http import HttpServer, Turns, bind, post_route, url_of

N = 12


class Anybody:
    """Sessions that know everyone."""

    def authorize(self, headers: Any) -> None:
        return None


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


@pytest.mark.parametrize("path", ["/encode"])
async def test_a_burst_of_posts(path: str) -> None:
    """All of them lie in their sockets when the loop looks: none is handled in the same round as
    another."""
    turns, rounds, handled = Turns(), [0], []

    async def handler(message: wire.EncodeRequest, channel: Any) -> wire.Message:
        await turns.take()
        handled.append(rounds[0])
        return wire.EncodeResponse(())

    async def count() -> None:
        while len(handled) < N:
            rounds[0] += 1
            await asyncio.sleep(0)

    socket = bind("127.0.0.1", 0)
    route = post_route(path, wire.EncodeRequest, handler, Anybody(), 1 << 20)  # type: ignore[arg-type]
    server = HttpServer(Starlette(routes=[route]), socket, drain_s=1.0)
    serving = asyncio.create_task(server.run_until_stopped())
    body = wire.encode(wire.EncodeRequest("r", (), images_in_request=0))
    counting = asyncio.create_task(count())
    try:
        async with aiohttp.ClientSession() as client, asyncio.timeout(20):

            async def post() -> int:
                async with client.post(url_of(socket) + path, data=body) as answer:
                    return answer.status

            assert set(await asyncio.gather(*(post() for _ in range(N)))) == {200}
    finally:
        counting.cancel()
        server.stop()
        await serving
    assert len(set(handled)) == N
