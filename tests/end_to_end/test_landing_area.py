"""Requests whose embeddings are together larger than the area in which they land."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from tests.end_to_end.checks import TEXT, check_answer
from tests.end_to_end.cluster import Cluster, timeline
from tests.end_to_end.reference import Reference, question
from triptych.config import MIB, Timeouts
from triptych.demo.tiny import make_tiny_model
from triptych.engine.overlap import Overlap

POOL_S = 60.0
"""``timeouts.pool``: whoever waits for all of them ends by it."""
ANSWER_S = 45.0
SEEDS = list(range(48))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "qwen3_vl")


@pytest.mark.parametrize(
    ("topology", "overlap"), [("E/PD", "off"), ("E/P/D", "off"), ("E/PD", "adaptive")]
)
def test_they_are_served_all_the_same(model: Path, topology: str, overlap: Overlap) -> None:
    reference = Reference(model)
    with Cluster(
        model, topology, "http", landing_mib=1, overlap=overlap, timeouts=Timeouts(pool=POOL_S)
    ) as cluster:
        client = openai.OpenAI(
            base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=ANSWER_S
        )
        for seeds in (SEEDS, [0, 1]):
            check_answer(client, question(seeds, TEXT), reference.answer(seeds, TEXT, 4), 4)
        answer = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=question(SEEDS[::-1], TEXT),  # type: ignore[arg-type]
            max_tokens=1,
        )
        spans = timeline(cluster.url, answer.id.removeprefix("chatcmpl-"))["spans"]
    assert sum(span["nbytes"] for span in spans if span["name"] == "read") > MIB
