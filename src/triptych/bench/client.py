"""Sends loads to OpenAI-compatible servers and notes when every piece of an answer came.

One event loop does it all, so what it does for an event is little: find the line, decode four
fields, note the time.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from triptych.bench.config import Load
from triptych.bench.figures import Sample
from triptych.bench.loads import Request, closed
from triptych.errors import TransferFailed, WorkerLost

CONNECT_S = 10.0
SILENCE_S = 300.0
"""Longest silence of a stream, the wait for the first token included."""
CONTROL_S = 30.0
"""Questions about models and timelines."""
_DATA, _DONE = b"data:", b"[DONE]"


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_event = msgspec.json.Decoder(_Event)


@dataclass
class Stream:
    """One load under way."""

    name: str
    load: Load
    requests: Sequence[Request]
    samples: list[Sample] = field(default_factory=list)


class Client:
    """``async with Client(urls) as client``. Of several servers each takes a request in turn."""

    def __init__(self, urls: Sequence[str], api_key: str | None, *, exact: bool = True) -> None:
        """``exact``: an answer of another length than was asked for counts as an error."""
        self.urls = [url.rstrip("/").removesuffix("/v1") for url in urls]
        self._turn = itertools.cycle(self.urls)
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._exact = exact

    async def __aenter__(self) -> Client:
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)
        self._http = aiohttp.ClientSession(
            timeout=limits, headers=self._headers, connector=aiohttp.TCPConnector(limit=0)
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.close()

    async def model(self) -> str:
        """The first that the first server lists. Raises WorkerLost, TransferFailed."""
        found = await self._get(f"{self.urls[0]}/v1/models")
        return str(found["data"][0]["id"])

    async def timeline(self, sample: Sample) -> dict[str, Any]:
        """What the server's roles did for the request. Raises WorkerLost, TransferFailed."""
        return await self._get(f"{sample.url}/v1/requests/{sample.request_id}/timeline")

    async def _get(self, url: str) -> dict[str, Any]:
        limit = aiohttp.ClientTimeout(total=CONTROL_S)
        try:
            async with self._http.get(url, timeout=limit) as response:
                if response.status != 200:
                    raise TransferFailed(f"{url}: status {response.status}")
                found: dict[str, Any] = await response.json()
                return found
        except (aiohttp.ClientError, TimeoutError) as exc:
            raise WorkerLost(f"{url}: {exc or type(exc).__name__}") from exc

    async def run(self, streams: Sequence[Stream], done: Callable[[Stream], None]) -> None:
        """Send all streams' requests at once, each in its own time, until all are answered; what
        else the other streams have is not sent once the first has its answers. ``done`` is called
        at every answer."""
        over = asyncio.Event()
        begin = time.perf_counter()

        async def send(stream: Stream) -> None:
            await (self._closed if closed(stream.load) else self._open)(stream, begin, over, done)
            if stream is streams[0]:
                over.set()

        await _together(send(stream) for stream in streams)

    async def _closed(
        self, stream: Stream, begin: float, over: asyncio.Event, done: Callable[[Stream], None]
    ) -> None:
        requests = _until(stream, begin, over)

        async def loop() -> None:
            for request in requests:
                await self._ask(stream, request, begin, time.perf_counter() - begin)
                done(stream)

        await _together(loop() for _ in range(stream.load.concurrency))

    async def _open(
        self, stream: Stream, begin: float, over: asyncio.Event, done: Callable[[Stream], None]
    ) -> None:
        async def one(request: Request) -> None:
            await self._ask(stream, request, begin, request.at)
            done(stream)

        async with asyncio.TaskGroup() as group:
            for request in stream.requests:
                if stream.load.seconds is not None and request.at > stream.load.seconds:
                    return
                if await _set_within(over, begin + request.at - time.perf_counter()):
                    return
                group.create_task(one(request))

    async def _ask(self, stream: Stream, request: Request, begin: float, due: float) -> None:
        """One request; what came of it is appended to the stream's samples, also when this is
        cancelled. Errors of the server and of the connection are kinds, not exceptions."""
        url = next(self._turn)
        sample = Sample(due=due, sent_at=time.time(), url=url)
        stream.samples.append(sample)
        try:
            sample.error = await self._answer(sample, request, begin)
        except TimeoutError:
            sample.error = "timeout"
        except aiohttp.ClientError as exc:
            sample.error = f"connection: {type(exc).__name__}"
        except msgspec.DecodeError:
            sample.error = "not an event"
        sample.end = time.perf_counter() - begin

    async def _answer(self, sample: Sample, request: Request, begin: float) -> str:
        """The kind of error, "" for none."""
        path = f"{sample.url}/v1/chat/completions"
        async with self._http.post(path, data=io.BytesIO(request.body)) as response:
            sample.request_id = response.headers.get("x-request-id", "")
            if response.status != 200:
                return f"status {response.status}"
            async for data in _events(response):
                if data == _DONE:
                    return self._verdict(sample, request)
                event = _event.decode(data)
                if event.error is not None:
                    return "error in the stream"
                if event.usage is not None:
                    sample.n_prompt = event.usage.prompt_tokens
                    sample.n_output = event.usage.completion_tokens
                if any(c.delta.content or c.delta.reasoning_content for c in event.choices):
                    sample.texts.append(time.perf_counter() - begin)
        return "the stream was cut"

    def _verdict(self, sample: Sample, request: Request) -> str:
        sample.n_output = sample.n_output or len(sample.texts)  # a server without usage
        if not sample.texts:
            return "no text"
        if self._exact and sample.n_output != request.n_output:
            return "another length"
        return ""


def _until(stream: Stream, begin: float, over: asyncio.Event) -> Iterator[Request]:
    """The stream's requests while it may still send."""
    for request in stream.requests:
        late = stream.load.seconds is not None and (
            time.perf_counter() - begin > stream.load.seconds
        )
        if late or over.is_set():
            return
        yield request


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    """Whether ``event`` is set by then."""
    if seconds <= 0:
        return event.is_set()
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False


async def _together(work: Any) -> None:
    async with asyncio.TaskGroup() as group:
        for each in work:
            group.create_task(each)


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of every server-sent event."""
    rest = b""
    async for chunk in response.content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(_DATA):
                yield line[len(_DATA) :].strip()
