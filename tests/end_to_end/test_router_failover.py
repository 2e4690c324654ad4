"""Answers that go on at another worker when theirs is lost in the middle, among stub workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from tests.end_to_end.routing import SAID, Deployment, all_idle, deploy, epd, until, with_images
from tests.end_to_end.stub_workers import StubWorker
from triptych import wire
from triptych.config import ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.errors import WorkerLost
from triptych.router import files
from triptych.router.prompt import Prompter


@pytest.fixture(scope="module")
def prompter(tmp_path_factory: pytest.TempPathFactory) -> Prompter:
    return Prompter(ModelConfig(str(make_tiny_model(tmp_path_factory.mktemp("tiny")))))


INLINE = with_images(b"1")
ELSEWHERE = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": "https://example.org/1.png"}},
            {"type": "text", "text": "hm?"},
        ],
    }
]


async def lose_decode_after(
    d: Deployment,
    n_chunks: int,
    *,
    encoders_forget: bool = False,
    messages: list[dict[str, Any]] = INLINE,
) -> tuple[AsyncIterator[Any], list[Any], StubWorker]:
    """(the rest of the stream, its chunks so far, the worker that has died)."""
    stream = await d.ask(stream=True, messages=messages, seed=5)
    seen = [await anext(stream) for _ in range(n_chunks)]
    victim = next(w for w in d.workers if w.role == "decode" and w.seen("/decode"))
    if encoders_forget:
        for worker in d.workers:
            worker.known.clear()
    await victim.die()
    return stream, seen, victim


async def test_a_stream_goes_on_where_its_lost_worker_stopped(prompter: Prompter) -> None:
    workers = [*epd(), StubWorker("decode", 1)]
    workers[3].pause_s = workers[4].pause_s = 0.1
    async with deploy(prompter, *workers) as d:
        stream, seen, victim = await lose_decode_after(d, 3)
        seen += [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in seen) == SAID
        assert seen[-1].choices[0].finish_reason == "stop"
        first, second = d.worker("prefill").seen("/prefill")
        assert isinstance(first, wire.PrefillRequest) and isinstance(second, wire.PrefillRequest)
        assert (second.token_ids, second.sampling) == (first.token_ids, first.sampling)
        n_had = len(second.resumed)
        assert n_had > 0 and second.resumed == tuple(workers[0].answer[:n_had])
        other = next(w for w in d.workers if w.role == "decode" and w is not victim)
        (go_on,) = other.seen("/decode")
        assert isinstance(go_on, wire.DecodeRequest) and go_on.resumed == second.resumed
        assert all_idle(d)


async def test_one_that_comes_back_in_time_goes_on(prompter: Prompter) -> None:
    """The only decode worker dies; its successor registers while the request waits."""
    workers = epd()
    workers[3].pause_s = 0.1
    async with deploy(prompter, *workers) as d:
        stream, seen, victim = await lose_decode_after(d, 3)
        successor = StubWorker("decode", 7)
        for name in ("router", "secrets", "answer", "capacity"):
            setattr(successor, name, getattr(victim, name))
        async with successor.running():
            seen += [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in seen) == SAID


async def test_with_none_to_come_back_the_stream_ends_by_name(prompter: Prompter) -> None:
    workers = epd()
    workers[3].pause_s = 0.1
    async with deploy(prompter, *workers) as d:
        stream, seen, _ = await lose_decode_after(d, 3)
        with pytest.raises(openai.APIError, match="no decode worker") as caught:
            async for chunk in stream:
                seen.append(chunk)
        body: Any = caught.value.body
        assert body["code"] == "worker_lost"
        assert SAID.startswith("".join(c.choices[0].delta.content or "" for c in seen))


async def test_losing_worker_after_worker_ends_by_name_unless_the_answer_goes_on(
    prompter: Prompter,
) -> None:
    """Each token begins the count anew; without one, a third failure is the last."""
    workers = [*epd(), *(StubWorker("decode", n) for n in (1, 2, 3))]

    def fail(worker: StubWorker, request_id: str) -> bool:
        worker.report(request_id, WorkerLost("on purpose"))
        return False

    for worker in workers:
        if worker.role == "decode":
            worker.on_start = fail
    async with deploy(prompter, *workers) as d:
        with pytest.raises(openai.APIError, match="on purpose"):
            await d.ask()


async def test_workers_that_die_one_after_the_other_cost_no_request(prompter: Prompter) -> None:
    """Before its first token, four times; more than a worker that lives may fail it."""
    dying = [StubWorker("decode", n) for n in range(4)]
    for worker in dying:
        worker.hold = asyncio.Event()
    workers = [StubWorker("encoder"), StubWorker("prefill"), *dying, StubWorker("decode", 9)]
    async with deploy(prompter, *workers) as d:
        asking = asyncio.create_task(d.ask())
        for worker in dying:
            await until(lambda: bool(worker.calls))  # noqa: B023
            await worker.channel.close()
        assert (await asking).choices[0].message.content == SAID
        for worker in dying:
            assert worker.hold is not None
            worker.hold.set()
        assert all_idle(d)


class Fetches:
    """Counts what the router fetches; ``changing``: every time it is another file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, changing: bool = False) -> None:
        self.count = 0
        self.changing = changing
        monkeypatch.setattr(files, "fetch", self.fetch)

    async def fetch(self, url: str, **limits: Any) -> bytes:
        self.count += 1
        return f"{url}{self.count if self.changing else 0}".encode()


@pytest.mark.parametrize("forgotten", [False, True])
async def test_bytes_are_fetched_again_only_for_an_encoder_that_has_not_the_embedding(
    prompter: Prompter, monkeypatch: pytest.MonkeyPatch, forgotten: bool
) -> None:
    fetches = Fetches(monkeypatch)
    workers = [*epd(), StubWorker("decode", 1)]
    workers[3].pause_s = workers[4].pause_s = 0.1
    async with deploy(prompter, *workers) as d:
        stream, seen, _ = await lose_decode_after(
            d, 3, encoders_forget=forgotten, messages=ELSEWHERE
        )
        seen += [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in seen) == SAID
        assert fetches.count == (2 if forgotten else 1)


async def test_a_file_that_has_changed_meanwhile_ends_the_stream_by_name(
    prompter: Prompter, monkeypatch: pytest.MonkeyPatch
) -> None:
    Fetches(monkeypatch, changing=True)
    workers = [*epd(), StubWorker("decode", 1)]
    workers[3].pause_s = workers[4].pause_s = 0.1
    async with deploy(prompter, *workers) as d:
        stream, _, _ = await lose_decode_after(d, 3, encoders_forget=True, messages=ELSEWHERE)
        with pytest.raises(openai.APIError, match="has changed since the request came"):
            async for _ in stream:
                pass
        assert all_idle(d)
