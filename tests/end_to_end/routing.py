"""A router among stub workers: the official client outside, the real wire protocol inside."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from openai import AsyncOpenAI

from tests.end_to_end.stub_workers import MODEL, SECRETS, TIMEOUTS, StubWorker
from triptych.config import ModelConfig, RouterConfig, Secrets, Timeouts
from triptych.router.app import Router
from triptych.router.prompt import Prompter
from triptych.stage.http import HttpServer, bind, url_of

SAID = " the red circle and the blue square."
USER = {"role": "user", "content": "what is this?"}


@dataclass
class Deployment:
    router: Router
    url: str
    client: AsyncOpenAI
    workers: list[StubWorker]

    def worker(self, role: str, number: int = 0) -> StubWorker:
        return next(w for w in self.workers if (w.role, w.number) == (role, number))

    async def ask(self, **more: Any) -> Any:
        arguments: dict[str, Any] = {"model": "tiny", "messages": [USER], **more}
        return await self.client.chat.completions.create(**arguments)

    def drop_all(self) -> None:
        for worker in self.workers:
            worker.cancelled.clear()
            worker.cancelled_at.clear()


@asynccontextmanager
async def deploy(
    prompter: Prompter,
    *workers: StubWorker,
    secrets: Secrets = SECRETS,
    timeouts: Timeouts = TIMEOUTS,
    **more: Any,
) -> AsyncIterator[Deployment]:
    config = RouterConfig(ModelConfig("unused"), served_name="tiny", timeouts=timeouts, **more)
    router = Router(config, secrets, prompter, MODEL)
    sock = bind("127.0.0.1", 0)
    url = url_of(sock)
    server = HttpServer(router.app, sock, 1)
    serving = asyncio.create_task(server.run_until_stopped())
    said = prompter._encode(SAID)
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="a key", max_retries=0, timeout=20)
    try:
        await until(lambda: server.started)
        async with AsyncExitStack() as stack:
            for worker in workers:
                worker.router = url
                worker.answer = worker.answer or said
                await stack.enter_async_context(worker.running())
            await until(lambda: router.membership.present().total() == len(workers))
            yield Deployment(router, url, client, list(workers))
            for worker in workers:  # all at once: each takes its time
                worker.server.stop()
    finally:
        await client.close()
        server.stop()
        await serving
        await router.close()


def epd(**more: Any) -> list[StubWorker]:
    return [
        StubWorker("encoder", 0),
        StubWorker("encoder", 1),
        StubWorker("prefill", **more),
        StubWorker("decode", **more),
    ]


def e_pd(**more: Any) -> list[StubWorker]:
    return [StubWorker("encoder"), StubWorker("language", **more)]


def picture(data: bytes) -> dict[str, Any]:
    encoded = base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}


def with_images(*data: bytes) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*map(picture, data), {"type": "text", "text": "hm?"}]}]


IMAGES = (b"one", b"two", b"three" * 50_000, b"four")


async def text_of(stream: Any) -> tuple[str, str | None]:
    text, finish = "", None
    async for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    return text, finish


async def gone(worker: StubWorker) -> None:
    async with asyncio.timeout(3):
        await worker.cancelled_at.wait()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


def all_idle(deployment: Deployment) -> bool:
    known = [w for role in ("encoder", "prefill", "decode", "language")
             for w in deployment.router.membership.workers(role)]  # fmt: skip
    return all(w.load == 0 and not w.requests for w in known)
