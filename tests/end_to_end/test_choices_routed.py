"""``n`` answers to one request among stub workers: failover, failures, clients that leave."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from tests.end_to_end.routing import (
    SAID,
    Deployment,
    all_idle,
    deploy,
    e_pd,
    epd,
    gone,
    until,
    with_images,
)
from tests.end_to_end.stub_workers import StubWorker
from triptych import wire
from triptych.config import ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.errors import BadMedia, WorkerLost
from triptych.router.prompt import Prompter

N = 3


@pytest.fixture(scope="module")
def prompter(tmp_path_factory: pytest.TempPathFactory) -> Prompter:
    return Prompter(ModelConfig(str(make_tiny_model(tmp_path_factory.mktemp("tiny")))))


def prefilled(d: Deployment) -> list[wire.PrefillRequest]:
    found = [m for w in d.workers for path in ("/prefill", "/generate") for m in w.seen(path)]
    return [m for m in found if isinstance(m, wire.PrefillRequest)]


async def test_files_go_to_an_encoder_once_and_every_answer_has_a_number(
    prompter: Prompter,
) -> None:
    async with deploy(prompter, *epd()) as d:
        answer = await d.ask(messages=with_images(b"one", b"two"), n=N)
        assert [c.message.content for c in answer.choices] == [SAID] * N
        works = prefilled(d)
        assert len({work.request_id for work in works}) == N
        assert [work.sampling.choice for work in works] == [0, 1, 2]
        assert len({work.sampling.seed for work in works}) == 1
        assert len({work.token_ids for work in works}) == 1
        n_answer = len(prompter._encode(SAID)) + 1
        assert answer.usage.prompt_tokens == len(works[0].token_ids)
        assert answer.usage.completion_tokens == N * n_answer
        assert not any(w.cancelled for w in d.workers)
        assert all_idle(d)


async def test_the_others_wait_for_the_first_ones_token(prompter: Prompter) -> None:
    workers = e_pd()
    workers[1].pause_s = 0.3
    async with deploy(prompter, *workers) as d:
        ask = asyncio.create_task(d.ask(n=N, max_tokens=2))
        await until(lambda: len(prefilled(d)) == 1)
        await asyncio.sleep(0.1)
        assert len(prefilled(d)) == 1
        await until(lambda: len(prefilled(d)) == N)
        assert not ask.done()
        await ask


@pytest.mark.parametrize("stream", [False, True])
async def test_one_that_fails_for_good_ends_all_by_name(prompter: Prompter, stream: bool) -> None:
    def fail_the_second(worker: StubWorker, request_id: str) -> bool:
        if request_id.endswith(".1"):
            asyncio.get_running_loop().call_later(
                0.2, worker.report, request_id, BadMedia("on purpose", item=0)
            )
        return not request_id.endswith(".1")

    workers = e_pd()
    workers[1].on_start = fail_the_second
    workers[1].pause_s = 0.1
    async with deploy(prompter, *workers) as d:
        with pytest.raises(openai.APIError, match="image 1: on purpose") as caught:
            answer = await d.ask(messages=with_images(b"one"), n=N, stream=stream)
            if stream:
                async for _ in answer:
                    pass
        body: Any = caught.value.body
        assert body["code"] == "invalid_image"
        await until(lambda: len(set(d.worker("language").cancelled)) == N)
        assert all_idle(d)


async def test_each_has_tries_of_its_own(prompter: Prompter) -> None:
    """One loses its worker, and only it is tried again."""
    failed: list[str] = []

    def fail_once(worker: StubWorker, request_id: str) -> bool:
        if request_id.endswith(".2") and not failed:
            failed.append(request_id)
            worker.report(request_id, WorkerLost("on purpose"))
            return False
        return True

    workers = [*e_pd(), StubWorker("language", 1)]
    for worker in workers:
        worker.on_start = fail_once
    async with deploy(prompter, *workers) as d:
        answer = await d.ask(n=N, seed=3)
        assert [c.message.content for c in answer.choices] == [SAID] * N
        (lost,) = failed
        works = prefilled(d)
        assert len(works) == N + 1
        (again,) = [work for work in works if work.request_id == f"{lost}-2"]
        assert again.sampling.choice == 2
        assert all_idle(d)


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_client_that_leaves_ends_all(prompter: Prompter, streaming: bool) -> None:
    workers = epd()
    workers[3].pause_s = 0.2
    async with deploy(prompter, *workers) as d:
        ask = asyncio.create_task(d.ask(n=N, stream=streaming))
        if streaming:
            stream = await ask
            await until(lambda: len(d.worker("decode").seen("/decode")) == N)
            await stream.close()
        else:
            await until(lambda: len(d.worker("decode").seen("/decode")) == N)
            ask.cancel()
        await gone(d.worker("decode"))
        await until(lambda: len(set(d.worker("decode").cancelled)) == N)
        assert all_idle(d)
