"""Both sides of a router under measurement: clients that cost little, and workers that compute
nothing and send the tokens of all requests in steps, as engines do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.end_to_end.stub_workers import SECRETS, StubWorker  # noqa: E402

from triptych import wire  # noqa: E402
from triptych.config import Timeouts  # noqa: E402
from triptych.request import Sampling, TokenEvent  # noqa: E402
from triptych.transfer.channel import Channel  # noqa: E402

ROWS = 2040
"""Of a 1920 x 1080 image in Qwen3-VL: 60 x 34."""
START_S = 60.0
ANSWER_S = 60.0
LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


# ------------------------------------------------------------------ workers


@dataclass
class SteppingWorker(StubWorker):
    """Sends the next token of every running answer in one message, every ``step_s``."""

    step_s: float = 0.01
    steps: list[int] = field(default_factory=list)
    """Number of tokens of each step."""

    @property
    def n_running(self) -> int:
        return len(self._left)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[StubWorker]:
        self._left: dict[str, list[TokenEvent]] = {}
        async with super().running():
            stepping = asyncio.create_task(self._step())
            try:
                yield self
            finally:
                stepping.cancel()

    def _send_soon(
        self, request_id: str, sampling: Sampling, start: int, *, only_one: bool = False
    ) -> None:
        events = self.events(request_id, sampling)[start:]
        self._left[request_id] = (events[:1] if only_one else events)[::-1]

    def _on_message(self, channel: Channel, message: wire.ChannelMessage) -> None:
        super()._on_message(channel, message)
        if isinstance(message, wire.Cancel):
            self._left.pop(message.request_id, None)

    async def _step(self) -> None:
        while True:
            await asyncio.sleep(self.step_s)
            if not self._left:
                continue
            events = tuple(left.pop() for left in self._left.values())
            self.channel.send(wire.Tokens(tokens=events))
            self.steps.append(len(events))
            self._left = {name: left for name, left in self._left.items() if left}


def workers(url: str, answer: Sequence[int]) -> list[SteppingWorker]:
    """Two encoders, prefill and decode."""
    roles = (("encoder", 0), ("encoder", 1), ("prefill", 0), ("decode", 0))
    return [
        SteppingWorker(
            role,
            number,
            router=url,
            answer=answer,
            timeouts=Timeouts(),
            rows=ROWS,
            capacity=wire.Capacity(max_model_len=1 << 18),
        )
        for role, number in roles
    ]


# ------------------------------------------------------------------ the router


@dataclass
class RouterProcess:
    url: str
    port: int
    process: psutil.Process
    workers: list[SteppingWorker]

    def cpu_s(self) -> float:
        """So far, all threads."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def worker(self, role: str) -> SteppingWorker:
        return next(worker for worker in self.workers if worker.role == role)


@asynccontextmanager
async def router(model: Path, answer: Sequence[int]) -> AsyncIterator[RouterProcess]:
    """A router process that serves ``model``'s tokenizer, with its workers in this process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "triptych", "router", str(model)]
    command += ["--port", str(port), "--topology", "E/P/D", "--served-name", "tiny"]
    env = {**os.environ, "TRIPTYCH_SECRET": SECRETS.shared.decode()}
    process = await asyncio.create_subprocess_exec(*command, env=env)
    try:
        await _until(f"{url}/health")
        async with AsyncExitStack() as stack:
            stubs = workers(url, answer)
            for worker in stubs:
                await stack.enter_async_context(worker.running())
            await _until(f"{url}/ready")
            yield RouterProcess(url, port, psutil.Process(process.pid), stubs)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _until(url: str) -> None:
    """Until a GET is answered by 200."""
    async with aiohttp.ClientSession() as client, asyncio.timeout(START_S):
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with client.get(url) as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.05)


# ------------------------------------------------------------------ clients


class Client(asyncio.Protocol):
    """One kept-alive connection; reads answers without looking into their events."""

    def __init__(self) -> None:
        self._got = bytearray()
        self._whole: asyncio.Future[bytes] | None = None

    @classmethod
    async def connect(cls, port: int) -> Client:
        _, client = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return client

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._whole is not None and not self._whole.done():
            self._whole.set_exception(exc or ConnectionError("closed before the answer's end"))

    def data_received(self, data: bytes) -> None:
        self._got += data
        if self._whole is not None and self._is_whole():
            self._whole.set_result(bytes(self._got))
            self._got.clear()

    def _is_whole(self) -> bool:
        if self._got.endswith(b"0\r\n\r\n"):
            return True
        head, found, body = self._got.partition(b"\r\n\r\n")
        length = LENGTH.search(head) if found else None
        return length is not None and len(body) >= int(length[1])

    async def ask(self, body: bytes) -> bytes:
        """The whole HTTP answer to ``POST /v1/chat/completions``. Raises RuntimeError."""
        self._whole = asyncio.get_running_loop().create_future()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: router\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self._transport.write(head.encode())
        self._transport.write(body)
        async with asyncio.timeout(ANSWER_S):
            answer = await self._whole
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(answer[:400].decode(errors="replace"))
        return answer

    def close(self) -> None:
        self._transport.close()
