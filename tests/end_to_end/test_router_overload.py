"""What a router refuses so that nothing waits without a bound, among stub workers."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from tests.end_to_end.routing import SAID, all_idle, deploy, e_pd, epd, until, with_images
from tests.end_to_end.stub_workers import StubWorker
from triptych import wire
from triptych.config import ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.errors import WorkerLost
from triptych.router.prompt import Prompter

KV = wire.Capacity(kv_blocks=10, block_size=16, max_model_len=2048)


@pytest.fixture(scope="module")
def prompter(tmp_path_factory: pytest.TempPathFactory) -> Prompter:
    return Prompter(ModelConfig(str(make_tiny_model(tmp_path_factory.mktemp("tiny")))))


async def ended(asking: list[asyncio.Task[Any]]) -> None:
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)


async def test_tokens_beyond_the_backlog_are_refused(prompter: Prompter) -> None:
    workers = e_pd(capacity=KV, on_start=lambda worker, request_id: False)
    async with deploy(prompter, *workers, max_backlog=2.0) as d:
        asking = [asyncio.create_task(d.ask(max_tokens=100)) for _ in range(2)]
        await until(lambda: len(d.worker("language").calls) == 2)
        with pytest.raises(openai.RateLimitError, match="holds 160") as caught:
            await d.ask(max_tokens=200)
        assert caught.value.response.headers["retry-after"] == "1"  # nothing is known yet
        asking.append(asyncio.create_task(d.ask(max_tokens=20)))  # but less than that is taken
        await until(lambda: len(d.worker("language").calls) == 3)
        await ended(asking)
        await until(lambda: all_idle(d))


async def test_what_was_taken_on_is_not_refused_when_it_is_tried_elsewhere(
    prompter: Prompter,
) -> None:
    workers = [*epd(capacity=KV), StubWorker("decode", 1, capacity=KV)]
    first, second = workers[3], workers[4]
    async with deploy(prompter, *workers, max_backlog=1.2) as d:
        first.on_start = second.on_start = lambda worker, request_id: False
        asking = [asyncio.create_task(d.ask(max_tokens=150)) for _ in range(2)]
        await until(lambda: bool(first.seen("/decode") and second.seen("/decode")))
        asking[0].cancel()
        await until(lambda: sum(w.load for w in d.router.membership.workers("decode")) < 300)
        await until(lambda: bool(first.cancelled or second.cancelled))
        busy, free = (first, second) if first.cancelled == [] else (second, first)
        free.refuse["/reserve"] = WorkerLost("on purpose")
        busy.on_start = None
        assert (await d.ask(max_tokens=150)).choices[0].message.content == SAID
        assert len(busy.seen("/decode")) == 2
        await ended(asking)


async def test_bytes_beyond_the_bound_are_refused(prompter: Prompter) -> None:
    workers = e_pd(on_start=lambda worker, request_id: False)
    async with deploy(prompter, *workers, max_held_mib=2) as d:
        large = with_images(b"x" * (1 << 20))  # 1.33 MiB of body
        asking = [asyncio.create_task(d.ask(messages=large))]
        await until(lambda: bool(d.worker("language").calls))
        with pytest.raises(openai.RateLimitError, match="bytes are held"):
            await d.ask(messages=large)
        asking.append(asyncio.create_task(d.ask()))  # a small one
        await until(lambda: len(d.worker("language").calls) == 2)
        await ended(asking)
        await until(lambda: all_idle(d))
        d.worker("language").on_start = None
        assert (await d.ask(messages=large)).choices[0].message.content == SAID


async def test_a_large_one_by_itself_is_taken(prompter: Prompter) -> None:
    async with deploy(prompter, *e_pd(), max_held_mib=1) as d:
        answer = await d.ask(messages=with_images(b"x" * (2 << 20)))
        assert answer.choices[0].message.content == SAID


async def test_retry_after_follows_the_pace(prompter: Prompter) -> None:
    workers = e_pd(pause_s=0.15)  # about two seconds an answer
    async with deploy(prompter, *workers, max_requests=1) as d:
        for _ in range(2):
            await d.ask()
        asking = asyncio.create_task(d.ask())
        await until(lambda: len(d.worker("language").calls) == 3)
        told = []
        for _ in range(3):
            with pytest.raises(openai.RateLimitError, match="in progress") as caught:
                await d.ask()
            told.append(int(caught.value.response.headers["retry-after"]))
        assert told == sorted(told) and 1 <= told[0] < told[-1] <= 30
        await asking
