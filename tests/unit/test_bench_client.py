"""The benchmark's client against a small server that answers as it is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from rich.console import Console

from triptych.bench import serve
from triptych.bench.client import Client, Stream
from triptych.bench.config import Goal, Load
from triptych.bench.loads import Request
from triptych.errors import TransferFailed, WorkerLost

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
PAUSE_S = 0.02


def event(text: str | None = None, **more: object) -> bytes:
    choices = [] if text is None else [{"index": 0, "delta": {"content": text}}]
    return b"data: " + json.dumps({"id": "x", "choices": choices, **more}).encode() + b"\n\n"


def request(n_output: int = 3, at: float = 0.0, **body: object) -> Request:
    return Request(at, json.dumps(body).encode(), n_output)


async def answer(call: web.Request) -> web.StreamResponse:
    """Three tokens, the first two in one write and cut at odd places."""
    response = web.StreamResponse(headers={"x-request-id": "r1"})
    await response.prepare(call)
    whole = event("") + event("one") + event("two")
    for part in (whole[:11], whole[11:70], whole[70:]):
        await response.write(part)
        await asyncio.sleep(0)
    await asyncio.sleep(PAUSE_S)
    await response.write(event("three") + event(usage={"prompt_tokens": 8, "completion_tokens": 3}))
    await response.write(b"data: [DONE]\n\n")
    return response


async def models(call: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": "a-model"}]})


async def timeline(call: web.Request) -> web.Response:
    return web.json_response({"arrived": 5.0, "spans": []})


@asynccontextmanager
async def server(handler: Handler) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", handler)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/v1/requests/r1/timeline", timeline)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield str(runner.addresses[0][1]).join(("http://127.0.0.1:", ""))
    finally:
        await runner.cleanup()


async def run(handler: Handler, *streams: Stream, exact: bool = True) -> None:
    async with server(handler) as url, Client([url], None, exact=exact) as client:
        async with asyncio.timeout(20):
            await client.run(streams, lambda stream: None)


def of(*requests: Request, **load: object) -> Stream:
    return Stream("", Load(**load), requests)  # type: ignore[arg-type]


async def test_an_answer_is_timed_token_by_token() -> None:
    stream = of(request())
    async with server(answer) as url, Client([f"{url}/v1/"], None) as client:
        await client.run([stream], lambda done: None)
        (found,) = stream.samples
        assert found.good and (found.n_prompt, found.n_output) == (8, 3)
        assert len(found.texts) == 3 and found.texts == sorted(found.texts)
        assert found.texts[2] - found.texts[1] > PAUSE_S / 2 > found.texts[1] - found.texts[0]
        assert found.end is not None and found.texts[-1] <= found.end
        assert (found.url, found.request_id) == (url, "r1")
        assert await client.model() == "a-model"
        assert await client.timeline(found) == {"arrived": 5.0, "spans": []}
        found.request_id = "r2"
        with pytest.raises(TransferFailed, match="404"):
            await client.timeline(found)


async def test_errors_have_kinds() -> None:
    """Each request says how it is answered."""

    async def bad(call: web.Request) -> web.StreamResponse:
        how = (await call.json())["how"]
        if how == "refused":
            return web.json_response({"error": {"message": "busy"}}, status=429)
        response = web.StreamResponse()
        await response.prepare(call)
        if how == "error":
            await response.write(event("one") + b'data: {"error": {"message": "lost"}}\n\n')
        elif how == "cut":
            await response.write(event("one"))
        elif how == "torn":
            await response.write(event("one"))
            assert call.transport is not None
            call.transport.abort()
        elif how == "noise":
            await response.write(b"data: {]\n\n")
        else:
            await response.write(event("one" if how == "short" else "") + b"data: [DONE]\n\n")
        return response

    hows = ["refused", "error", "cut", "torn", "noise", "short", "empty"]
    stream = of(*(request(how=how) for how in hows))
    await run(bad, stream)
    assert dict(zip(hows, (sample.error for sample in stream.samples), strict=True)) == {
        "refused": "status 429",
        "error": "error in the stream",
        "cut": "the stream was cut",
        "torn": "connection: ClientPayloadError",
        "noise": "not an event",
        "short": "another length",
        "empty": "no text",
    }
    short = of(request(how="short"))
    await run(bad, short, exact=False)
    assert short.samples[0].good and short.samples[0].n_output == 1


async def test_a_server_that_is_not_there() -> None:
    stream = of(request())
    async with Client(["http://127.0.0.1:9"], None) as client:
        await client.run([stream], lambda done: None)
        assert stream.samples[0].error == "connection: ClientConnectorError"
        with pytest.raises(WorkerLost, match="127.0.0.1:9"):
            await client.model()


async def test_a_closed_loop_keeps_so_many_under_way() -> None:
    now, most = 0, 0

    async def counted(call: web.Request) -> web.StreamResponse:
        nonlocal now, most
        now += 1
        most = max(most, now)
        try:
            return await answer(call)
        finally:
            now -= 1

    stream = of(*[request()] * 9, concurrency=3)
    await run(counted, stream)
    assert most == 3 and len(stream.samples) == 9


async def test_an_open_loop_sends_when_it_is_due_whatever_is_under_way() -> None:
    stream = of(*(request(at=at) for at in (0.0, 0.0, 0.05, 0.1)), rate=1.0)
    await run(answer, stream)
    assert [sample.due for sample in stream.samples] == [0.0, 0.0, 0.05, 0.1]
    wall = [sample.sent_at for sample in stream.samples]
    assert wall[2] - wall[0] >= 0.045 and wall[3] - wall[0] >= 0.095
    assert all(sample.good for sample in stream.samples)


async def test_nothing_is_sent_after_the_seconds_of_a_load() -> None:
    open_loop = of(*(request(at=at) for at in (0.0, 0.1, 5.0)), rate=1.0, seconds=0.2)
    await run(answer, open_loop)
    assert len(open_loop.samples) == 2
    closed_loop = of(*[request()] * 1000, seconds=5 * PAUSE_S)
    await run(answer, closed_loop)
    assert 1 <= len(closed_loop.samples) <= 6 and all(each.good for each in closed_loop.samples)


async def test_loads_beside_the_first_end_with_it() -> None:
    first = of(*[request()] * 4)
    endless = of(*[request()] * 1000, concurrency=2)
    due = of(*(request(at=at) for at in (0.0, 60.0)), rate=1.0)
    await run(answer, first, endless, due)
    assert len(first.samples) == 4 and len(due.samples) == 1
    assert 4 <= len(endless.samples) <= 40
    assert all(sample.good for stream in (first, endless, due) for sample in stream.samples)


async def test_several_servers_take_requests_in_turn() -> None:
    stream = of(*[request()] * 6)
    async with (
        server(answer) as one,
        server(answer) as other,
        Client([one, other], "key") as client,
    ):
        await client.run([stream], lambda done: None)
    assert [sample.url for sample in stream.samples] == [one, other] * 3


async def test_what_was_under_way_at_a_cut_is_not_finished() -> None:
    async def never(call: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        raise AssertionError

    stream = of(request())
    async with server(never) as url, Client([url], None) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await client.run([stream], lambda done: None)
    assert stream.samples[0].end is None and not stream.samples[0].good


async def test_the_limit_cuts_a_load_and_keeps_what_came() -> None:
    answered = 0

    async def stuck(call: web.Request) -> web.StreamResponse:
        nonlocal answered
        answered += 1
        if answered > 5:
            await asyncio.sleep(60)
        return await answer(call)

    loads = (("one", Load(output=3, concurrency=2)), ("other", Load(output=3, rate=9.0)))
    requests = ([request()] * 9, [request(at=at) for at in (0.0, 30.0)])
    prepared = serve.Prepared("row", loads, requests, ([request()], []))
    async with server(stuck) as url, Client([url], None) as client:
        with serve.bars(Console(quiet=True)) as progress:
            rows = await serve.rows_of(client, "A", 2, prepared, Goal(), 1.0, progress)
    assert [(row.name, row.cut) for row in rows] == [("row: one", True), ("row: other", True)]
    good = sum(row.summary.whole.requests for row in rows)
    assert good == 4, "five answers, one of them to the warm-up"
    assert sum(row.summary.errors["not finished"] for row in rows if row.summary.errors) == 2
    assert [{phase.who for phase in row.phases} for row in rows] == [{"client"}] * 2
