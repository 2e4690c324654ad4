"""Whole topologies whose language worker has too few KV blocks for all answers at once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.end_to_end.cluster import Cluster
from tests.end_to_end.reference import question
from tests.end_to_end.test_in_place import assert_nothing_is_held
from triptych.config import TransportName
from triptych.demo.tiny import make_tiny_model
from triptych.encoder.service import EncoderService
from triptych.observe import metrics

MAX_TOKENS = 150
QUESTIONS = [[], [0], [1, 2, 3], [4, 5], [6], [7, 8, 9]]
"""Seeds of each request's pictures. Together they want more than the cache of 1024 tokens."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "qwen3_vl")


def preempted() -> float:
    return metrics.preemptions._value.get()


async def ask_all(url: str, questions: list[list[int]], *, together: bool) -> list[list[Any]]:
    """Of each answer: its tokens with their log-probabilities."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:

        async def ask(number: int, seeds: list[int]) -> list[Any]:
            answer = await client.chat.completions.create(
                model=(await client.models.list()).data[0].id,
                messages=question(seeds),  # type: ignore[arg-type]
                max_tokens=MAX_TOKENS,
                logprobs=True,
                seed=number,
                extra_body={"temperature": 0.8 * (number % 2)},
            )
            found = answer.choices[0].logprobs
            assert found is not None and found.content is not None
            return [(token.token, round(token.logprob, 3)) for token in found.content]

        asking = [ask(number, seeds) for number, seeds in enumerate(questions)]
        if together:
            return list(await asyncio.gather(*asking))
        return [await each for each in asking]


def check(cluster: Cluster) -> None:
    one_by_one = asyncio.run(ask_all(cluster.url, QUESTIONS, together=False))
    before = preempted()
    at_once = asyncio.run(ask_all(cluster.url, QUESTIONS, together=True))
    assert preempted() > before
    for got, expected in zip(at_once, one_by_one, strict=True):
        assert [token for token, _ in got] == [token for token, _ in expected]
        assert [p for _, p in got] == pytest.approx([p for _, p in expected], abs=2e-3)
    assert_nothing_is_held(cluster)


@pytest.mark.parametrize("transport", ["shm", "http"])
def test_answers_are_those_of_requests_alone(model: Path, transport: TransportName) -> None:
    """Rows that had been given back are borrowed, or read, once more."""
    with Cluster(model, "E/PD", transport, kv_mib=1) as cluster:
        check(cluster)


def test_rows_that_the_encoder_let_go_are_encoded_again(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder that keeps nothing that is not lent."""
    on_idle = EncoderService._on_idle

    def forget(service: EncoderService, slot: int) -> None:
        on_idle(service, slot)
        embedding = service._embeddings.get(slot)
        if embedding is not None and embedding.cached and not service.producer.leases(slot):
            service._drop(embedding)

    monkeypatch.setattr(EncoderService, "_on_idle", forget)
    retried = metrics.retries.labels("encoder")
    before = retried._value.get()
    with Cluster(model, "E/PD", "http", kv_mib=1) as cluster:
        check(cluster)
    assert retried._value.get() > before
