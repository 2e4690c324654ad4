"""A request's own deadline ends it in whatever state it is, and leaves nothing in any role."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

from tests.end_to_end.cluster import Cluster
from tests.end_to_end.reference import question
from tests.end_to_end.test_bad_input import in_use, nothing_left
from triptych.config import Timeouts
from triptych.decode.server import DecodeService
from triptych.demo.tiny import make_tiny_model
from triptych.encoder.server import EncoderWorker

SHORT_S = 3.0
"""For what a request does within a tenth of it, where nothing else runs."""
SOON_S = 10.0
LONG_S = 300.0
HEADER = "X-Request-Timeout"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "qwen3_vl", "qwen3_vl")
    with Cluster(folder, "E/P/D", kv_mib=2, timeouts=Timeouts(pool=LONG_S)) as running:
        yield running


@asynccontextmanager
async def asking(cluster: Cluster) -> AsyncIterator[Any]:
    async with openai.AsyncOpenAI(
        base_url=f"{cluster.url}/v1", api_key="none", max_retries=0
    ) as client:

        async def ask(*seeds: int, **more: Any) -> Any:
            arguments: dict[str, Any] = {
                "model": str(cluster.model),
                "messages": question(list(seeds)),
                "max_tokens": 300,
                "extra_body": {"ignore_eos": True, "timeout": SHORT_S},
                **more,
            }
            return await client.chat.completions.create(**arguments)

        yield ask


def hold_encoder(cluster: Cluster, hold: bool) -> None:
    """No forward begins, as when one runs and takes its time."""
    for stage in cluster.stages:
        if isinstance(stage.service, EncoderWorker):
            stage.service.service._running = hold
            stage.service.service._pump()


def held(cluster: Cluster) -> dict[str, int]:
    return dict(cluster.call(in_use, cluster))


async def until(asked: asyncio.Task[Any], condition: Callable[[], bool]) -> None:
    """``condition``, asked on a thread, holds while the request runs."""
    while not await asyncio.to_thread(condition):
        assert not asked.done(), asked
        await asyncio.sleep(0.02)


def room(cluster: Cluster) -> int:
    """Tokens that decode has blocks for."""
    (service,) = (s.service for s in cluster.stages if isinstance(s.service, DecodeService))
    engine: Any = service.host.engine
    return int(engine._scheduler.blocks.n_free * engine.kv.block_size)


async def test_while_its_image_waits_to_be_encoded(cluster: Cluster) -> None:
    """Encoder, prefill and decode all hold something for it by then."""
    cluster.call(hold_encoder, cluster, True)
    try:
        async with asking(cluster) as ask:
            began = time.monotonic()
            asked = asyncio.create_task(ask(1, 2))
            roles = ("encoder leases", "prefill slots", "reservations", "decode blocks")
            await until(asked, lambda: all(held(cluster)[name] > 0 for name in roles))
            with pytest.raises(openai.APIStatusError, match="not finished in 3 s") as caught:
                await asked
        assert caught.value.status_code == 504
        assert caught.value.code == "deadline_exceeded"
        assert SHORT_S <= time.monotonic() - began < SHORT_S + SOON_S
        await asyncio.to_thread(nothing_left, cluster)
    finally:
        cluster.call(hold_encoder, cluster, False)
    async with asking(cluster) as ask:
        again = await ask(1, 2, max_tokens=2, extra_body={})
        assert again.choices[0].finish_reason is not None
    await asyncio.to_thread(nothing_left, cluster)


async def test_while_it_waits_for_blocks(cluster: Cluster) -> None:
    """Another request has them all; the one that waits ends first, and harms it not."""
    async with asking(cluster) as ask:
        many = {"max_tokens": 700, "extra_body": {"ignore_eos": True, "timeout": LONG_S}}
        first = [asyncio.create_task(ask(seed, **many)) for seed in range(4)]
        await until(first[0], lambda: cluster.call(room, cluster) < 700)
        late = {"max_tokens": 700, "extra_body": {"ignore_eos": True, "timeout": 0.2}}
        second = await asyncio.gather(*(ask(9, **late) for _ in range(4)), return_exceptions=True)
        assert all(isinstance(error, openai.APIStatusError) for error in second), second
        assert {error.status_code for error in second} == {504}
        for answer in await asyncio.gather(*first):
            assert answer.usage.completion_tokens == 700
    await asyncio.to_thread(nothing_left, cluster)


@pytest.mark.parametrize("n", [1, 3])
async def test_in_the_middle_of_its_answer(cluster: Cluster, n: int) -> None:
    async with asking(cluster) as ask:
        began = time.monotonic()
        await ask(*(3, 4), n=n, max_tokens=2, extra_body={"timeout": LONG_S})
        # A few of its tokens are there by then, and hundreds are not.
        timeout_s = f"{max(0.3, 4 * (time.monotonic() - began)):.1f}"
        stream = await ask(
            *(5, 6), stream=True, n=n, max_tokens=1000, extra_headers={HEADER: timeout_s}
        )
        seen = 0
        with pytest.raises(openai.APIError, match="not finished in") as caught:
            async for _ in stream:
                seen += 1
        body: Any = caught.value.body
        assert body["code"] == "deadline_exceeded"
        assert seen > n
    await asyncio.to_thread(nothing_left, cluster)


async def test_at_any_moment(cluster: Cluster) -> None:
    """Many deadlines, so short that they overtake calls between the roles."""
    draw = random.Random(5)
    async with asking(cluster) as ask:
        for _ in range(6):
            rounds = [
                ask(
                    *(draw.randrange(1000), draw.randrange(1000)),
                    extra_body={"ignore_eos": True, "timeout": draw.uniform(0.001, 0.15)},
                )
                for _ in range(8)
            ]
            ended = await asyncio.gather(*rounds, return_exceptions=True)
            assert {getattr(error, "status_code", error) for error in ended} <= {504}
    await asyncio.to_thread(nothing_left, cluster)


@pytest.mark.parametrize("given", ["soon", "-1", "0", "nan", ""])
async def test_a_header_that_is_no_time(cluster: Cluster, given: str) -> None:
    async with asking(cluster) as ask:
        with pytest.raises(openai.BadRequestError, match="is not a time") as caught:
            await ask(extra_headers={HEADER: given})
        assert caught.value.param == HEADER


async def test_the_shortest_holds(cluster: Cluster) -> None:
    async with asking(cluster) as ask:
        for header, body in (("0.05", 30), ("30", 0.05)):
            more = {"ignore_eos": True, "timeout": body}
            with pytest.raises(openai.APIStatusError, match="not finished in 0.05 s"):
                await ask(max_tokens=1000, extra_headers={HEADER: header}, extra_body=more)
        with pytest.raises(openai.BadRequestError, match="timeout"):
            await ask(extra_body={"timeout": 0})
    await asyncio.to_thread(nothing_left, cluster)
