"""Requests whose images lie at two encoders, whose pools have room for few of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import openai
import pytest

from tests.end_to_end.cluster import Cluster
from tests.end_to_end.encoder_bench import picture, png
from tests.end_to_end.routing import IMAGES, SAID, all_idle, deploy, epd, with_images
from tests.end_to_end.stub_workers import StubWorker
from triptych import wire
from triptych.config import ModelConfig, Timeouts
from triptych.demo.tiny import make_tiny_model
from triptych.errors import NoRoom, PromptTooLong
from triptych.router.prompt import Prompter

POOL_S = 200.0
"""``timeouts.pool``: requests that wait for each other in a circle end by it. What must be done
before takes seconds, or a minute where other work has most of the machine."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def prompter(folder: Path) -> Prompter:
    return Prompter(ModelConfig(str(folder)))


def asked(worker: StubWorker) -> list[wire.EncodeRequest]:
    return worker.seen("/encode")  # type: ignore[return-value]


async def test_all_is_given_back_before_one_waits_in_the_order_of_ids(prompter: Prompter) -> None:
    workers = epd()
    full = next(w for w in workers if w.worker_id == "encoder-1")
    full.refuse["/encode"] = NoRoom("no room now")
    async with deploy(prompter, *workers) as d:
        asking = asyncio.create_task(d.ask(messages=with_images(*IMAGES)))
        first = d.worker("encoder", 0)
        await asyncio.wait_for(first.cancelled_at.wait(), POOL_S)
        full.refuse.clear()
        assert (await asking).choices[0].message.content == SAID
        at_once, patient = ([m for m in asked(first) if m.wait is wait] for wait in (False, True))
        patient += [m for m in asked(full) if m.wait]
        assert len({m.request_id for m in patient}) == 1
        assert first.cancelled == [at_once[0].request_id] != [patient[0].request_id]
        sent = [(item.index, item.data) for m in patient for item in m.items]
        assert sorted(sent) == list(enumerate(IMAGES))
        assert all_idle(d)


async def test_a_pool_that_stays_full_is_a_429(prompter: Prompter) -> None:
    workers = epd()
    for worker in workers:
        if worker.role == "encoder":
            worker.refuse["/encode"] = NoRoom("no room now")
    async with deploy(prompter, *workers) as d:
        with pytest.raises(openai.RateLimitError, match="no room now"):
            await d.ask(messages=with_images(*IMAGES))
        assert all_idle(d)


@pytest.mark.parametrize("most", [2, 1])
async def test_what_one_pool_cannot_hold_is_spread_evenly(prompter: Prompter, most: int) -> None:
    """One encoder has so much to do that the other is given all of a request."""

    def encode(worker: StubWorker, message: wire.EncodeRequest) -> None:
        if len(message.items) > most:
            raise PromptTooLong(f"{len(message.items)} images, the pool has room for {most}")

    images = (b"one", b"two", b"four", b"five")
    workers = epd()
    for worker in workers[:2]:
        worker.on_encode = encode
    async with deploy(prompter, *workers) as d:
        (busy,) = (w for w in d.router.membership.workers("encoder") if w.worker_id == "encoder-0")
        busy.load += 1_000_000
        asking = d.ask(messages=with_images(*images))
        if most == 1:  # nor do both together
            with pytest.raises(openai.BadRequestError, match="the pool has room for 1"):
                await asking
        else:
            assert (await asking).choices[0].message.content == SAID
        shares = [{item.index for item in m.items} for w in workers[:2] for m in asked(w)]
        assert shares.count(set(range(4))) == 1, "at first all went to one"
        assert {0, 1, 2, 3} == set.union(*(share for share in shares if len(share) == 2))
        busy.load -= 1_000_000
        assert all_idle(d)


def test_requests_over_two_full_encoders_do_not_lock_up(folder: Path) -> None:
    """Six of 196 KiB each are five to a pool of 1 MiB: no two requests fit at the same time."""
    timeouts = Timeouts(pool=POOL_S)
    with Cluster(folder, "E/PD", encoders=2, pool_mib=1, timeouts=timeouts) as cluster:

        async def burst() -> list[str]:
            client = openai.AsyncOpenAI(
                base_url=f"{cluster.url}/v1", api_key="-", max_retries=0, timeout=POOL_S
            )

            async def ask(number: int) -> str:
                images = [png(picture(10 * number + i, 448, 448)) for i in range(6)]
                answer = await client.chat.completions.create(
                    model=str(folder), messages=with_images(*images), max_tokens=1, temperature=0
                )
                return answer.choices[0].finish_reason

            async with client:
                return await asyncio.gather(*(ask(number) for number in range(8)))

        loop = asyncio.new_event_loop()
        try:
            finished = loop.run_until_complete(asyncio.wait_for(burst(), POOL_S * 0.9))
        finally:
            loop.close()
        assert finished == ["length"] * 8
