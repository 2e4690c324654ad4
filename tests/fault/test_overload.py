"""More than a small deployment can do: answered or refused by name, nothing lost, nothing left."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.end_to_end.reference import question
from tests.fault.deployed import Deployed
from tests.fault.forks import Forks
from triptych.demo.tiny import make_tiny_model

BURST = 200
MAX_REQUESTS = 64
KINDS = 8
"""Different requests."""
FREED_S = 0.1
"""From the end of the running steps to nothing being held."""
STEP_S = 0.3
"""A running step and a look at the metrics, on a busy machine."""
OPTIONS = {
    "router": ("--max-requests", str(MAX_REQUESTS), "--max-backlog", "3"),
    "encoder": ("--pool-mib", "2"),
    "prefill": ("--kv-mib", "4"),
    "decode": ("--kv-mib", "4"),
}


@pytest.fixture(scope="module")
def deployed(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    folder: Path = make_tiny_model(tmp_path_factory.mktemp("model") / "qwen3_vl", "qwen3_vl")
    counts = {"encoder": 1, "prefill": 1, "decode": 1}
    with Deployed(forks, folder, counts, tmp_path_factory.mktemp("logs"), OPTIONS) as running:
        yield running


async def ask(client: openai.AsyncOpenAI, model: Path, number: int, **more: Any) -> Any:
    kind = number % KINDS
    arguments: dict[str, Any] = {
        "model": str(model),
        "messages": question([kind, kind + 1]),
        "max_tokens": 24,
        "temperature": 0.8,
        "seed": kind,
        "logprobs": True,
        "extra_body": {"ignore_eos": True},
        **more,
    }
    return await client.chat.completions.create(**arguments)


def client_of(deployed: Deployed) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{deployed.url}/v1", api_key="-", max_retries=0, timeout=200
    )


def tokens(answer: Any) -> list[str]:
    return [token.token for token in answer.choices[0].logprobs.content]


async def test_a_burst_is_answered_or_refused_by_name(deployed: Deployed) -> None:
    """Those that are answered have the tokens that they have by themselves."""
    async with client_of(deployed) as client:
        alone = [tokens(await ask(client, deployed.model, n)) for n in range(KINDS)]
        burst = await asyncio.gather(
            *(ask(client, deployed.model, n) for n in range(BURST)), return_exceptions=True
        )
    ends: Counter[str] = Counter()
    for number, end in enumerate(burst):
        if isinstance(end, openai.RateLimitError):
            ends["refused"] += 1
            assert end.code == "overloaded"
            assert 1 <= int(end.response.headers["retry-after"]) <= 120
        else:
            assert not isinstance(end, BaseException), repr(end)
            ends["answered"] += 1
            assert tokens(end) == alone[number % KINDS]
    assert ends["answered"] + ends["refused"] == BURST
    assert ends["answered"] >= MAX_REQUESTS / 2, ends
    assert ends["refused"] >= 1, ends
    await asyncio.to_thread(deployed.nothing_left)


async def test_who_comes_again_when_told_is_answered(deployed: Deployed) -> None:
    """The official client waits for Retry-After by itself."""

    async def patiently(client: openai.AsyncOpenAI, number: int) -> Any:
        for _ in range(20):
            try:
                return await ask(client, deployed.model, number)
            except openai.RateLimitError as refusal:
                await asyncio.sleep(int(refusal.response.headers["retry-after"]))
        raise AssertionError("refused 20 times")

    async with client_of(deployed) as client:
        answers = await asyncio.gather(*(patiently(client, n) for n in range(BURST)))
    assert all(len(tokens(answer)) == 24 for answer in answers)
    await asyncio.to_thread(deployed.nothing_left)


@pytest.mark.parametrize("streams", [1, 8])
async def test_a_client_that_leaves_frees_everything_at_once(
    deployed: Deployed, streams: int
) -> None:
    took: list[float] = []
    async with client_of(deployed) as client:
        for _ in range(6):
            opened = await asyncio.gather(
                *(
                    ask(client, deployed.model, n, stream=True, max_tokens=400)
                    for n in range(streams)
                )
            )
            for stream in opened:
                await anext(aiter(stream))
            assert await asyncio.to_thread(deployed.held)
            began = time.monotonic()
            await asyncio.gather(*(stream.close() for stream in opened))
            await asyncio.to_thread(deployed.nothing_left)
            took.append(time.monotonic() - began)
    assert min(took) < FREED_S + STEP_S, took
    assert statistics.median(took) < 5 * (FREED_S + STEP_S), took
