"""Where a router sends its requests, among stub workers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.end_to_end.encoder_bench import picture, png
from tests.end_to_end.routing import Deployment, all_idle, deploy, until, with_images
from tests.end_to_end.stub_workers import StubWorker
from triptych import wire
from triptych.config import ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.router.prompt import Prompter

LONG = "a turn of a chat that is long enough to be remembered, and then some more of it. " * 40

SHORT = [{"role": "user", "content": "a short one"}]


@pytest.fixture(scope="module")
def prompter(tmp_path_factory: pytest.TempPathFactory) -> Prompter:
    return Prompter(ModelConfig(str(make_tiny_model(tmp_path_factory.mktemp("tiny")))))


def kv(tokens: int) -> wire.Capacity:
    return wire.Capacity(kv_blocks=tokens // 16, block_size=16, max_model_len=4096)


def twice(role: str, **more: Any) -> list[StubWorker]:
    return [StubWorker(role, 0, **more), StubWorker(role, 1, **more)]


def load_of(deployment: Deployment, worker: StubWorker) -> int:
    known = deployment.router.membership.workers(worker.role)
    return next(w.load for w in known if w.worker_id == worker.worker_id)


@pytest.mark.parametrize("role", ["prefill", "language"])
async def test_the_turns_of_a_chat_go_to_the_same_worker(prompter: Prompter, role: str) -> None:
    """Though other requests are outstanding there."""
    path = {"prefill": "/prefill", "language": "/generate"}[role]
    workers = [StubWorker("encoder"), *twice(role, capacity=kv(100_000))]
    if role == "prefill":
        workers.append(StubWorker("decode"))
    async with deploy(prompter, *workers) as d:
        first, second = d.worker(role, 0), d.worker(role, 1)
        messages = [{"role": "user", "content": LONG}]
        answer = await d.ask(messages=messages)
        (chosen,) = [w for w in (first, second) if w.seen(path)]
        for worker in (first, second):
            worker.on_start = lambda worker, request_id: False
        tasks = [asyncio.create_task(d.ask(messages=SHORT, max_tokens=9)) for _ in range(3)]
        await until(lambda: len(first.seen(path) + second.seen(path)) == 4)
        # What is outstanding at the chosen one is less than the turn that it has had.
        assert load_of(d, chosen) > 0
        messages += [
            {"role": "assistant", "content": answer.choices[0].message.content},
            {"role": "user", "content": "and then?"},
        ]
        before = len(chosen.seen(path))
        tasks.append(asyncio.create_task(d.ask(messages=messages)))
        await until(lambda: len(chosen.seen(path)) > before)
        for task in tasks:
            task.cancel()
        await until(lambda: all_idle(d))


async def test_decode_goes_where_blocks_are_free(prompter: Prompter) -> None:
    small, large = StubWorker("decode", 0, capacity=kv(320)), StubWorker("decode", 1)
    large.capacity = kv(3200)
    large.on_start = small.on_start = lambda worker, request_id: False
    async with deploy(prompter, StubWorker("encoder"), StubWorker("prefill"), small, large) as d:
        asked = [asyncio.create_task(d.ask(max_tokens=1000)) for _ in range(4)]
        await until(lambda: len(small.seen("/decode") + large.seen("/decode")) == 4)
        # Each takes about 1000 of the large one's 3200, until the small one's 320 are more.
        assert (len(large.seen("/decode")), len(small.seen("/decode"))) == (3, 1)
        for task in asked:
            task.cancel()
        await until(lambda: all_idle(d))


async def test_encoders_share_a_requests_patches(prompter: Prompter) -> None:
    large, *small = (png(picture(n, size, size)) for n, size in enumerate((448, 112, 112, 112)))
    workers = [*twice("encoder"), StubWorker("prefill"), StubWorker("decode")]
    async with deploy(prompter, *workers) as d:
        await d.ask(messages=with_images(large, *small))
        asked = {
            w.number: {i.index for m in w.seen("/encode") for i in m.items}  # type: ignore[attr-defined]
            for w in d.workers
            if w.role == "encoder"
        }
        assert sorted(map(sorted, asked.values())) == [[0], [1, 2, 3]]


async def test_what_an_encoder_has_cached_is_no_work(prompter: Prompter) -> None:
    """It counts as outstanding until the encoder has said so."""
    image = png(picture(7, 448, 448))
    encoder = StubWorker("encoder", cached=True)
    prefill = StubWorker("prefill", on_start=lambda worker, request_id: False)
    async with deploy(prompter, encoder, prefill, StubWorker("decode")) as d:
        encoder.hold = asyncio.Event()
        asked = asyncio.create_task(d.ask(messages=with_images(image)))
        await until(lambda: bool(encoder.calls))
        assert load_of(d, encoder) == 448 * 448 // 196
        encoder.hold.set()
        await until(lambda: bool(prefill.calls))
        assert load_of(d, encoder) == 0
        asked.cancel()
        await until(lambda: all_idle(d))


async def test_a_request_goes_to_a_worker_that_takes_one_so_long(prompter: Prompter) -> None:
    short, long = twice("language")
    short.capacity = wire.Capacity(max_model_len=50)
    long.capacity = wire.Capacity(max_model_len=500)
    async with deploy(prompter, StubWorker("encoder"), short, long) as d:
        await d.ask(max_tokens=100)
        assert (len(short.calls), len(long.calls)) == (0, 1)
        await d.ask(max_tokens=10)
        assert (len(short.calls), len(long.calls)) == (1, 1)
