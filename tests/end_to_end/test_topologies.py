"""Every topology gives Transformers' own answer: tokens and logits, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import openai
import pytest
import torch

from tests.end_to_end.cluster import Cluster, timeline
from tests.end_to_end.reference import Reference, question
from triptych.config import TransportName
from triptych.demo.tiny import make_tiny_model

FAMILIES = ("qwen3_vl", "qwen2_5_vl", "llava_onevision", "internvl")
TRANSPORTS = [name for name in get_args(TransportName) if name != "auto"]
IMAGES: list[list[int]] = [[], [0], [1, 2, 3]]
"""Seeds of each request's pictures."""
MAX_TOKENS = 12
TOLERANCE = 1e-4
TEXT = "Tell me about the pictures."


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    root = tmp_path_factory.mktemp("models")

    @cache
    def model(family: str) -> tuple[Path, Reference]:
        folder = make_tiny_model(root / family, family)
        return folder, Reference(folder)

    yield model


def check(cluster: Cluster, reference: Reference) -> None:
    """Text only, one image, three images: greedy answers with their best logprobs."""
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    name = client.models.list().data[0].id
    for seeds in IMAGES:
        expected = reference.answer(seeds, TEXT, MAX_TOKENS)
        answer = client.chat.completions.create(
            model=name,
            messages=question(seeds, TEXT),  # type: ignore[arg-type]
            max_tokens=MAX_TOKENS,
            temperature=0,
            logprobs=True,
            top_logprobs=20,
        )
        choice = answer.choices[0]
        assert choice.logprobs is not None and choice.logprobs.content is not None
        got = choice.logprobs.content
        assert len(got) == len(expected.ids), (seeds, choice.message.content, expected.text)
        for position, token in enumerate(got):
            row = expected.logprobs[position]
            assert abs(token.logprob - row[expected.ids[position]].item()) < TOLERANCE
            best = torch.tensor([other.logprob for other in token.top_logprobs])
            assert (best - row.topk(20).values).abs().max() < TOLERANCE
        assert choice.message.content == expected.text
        assert answer.usage is not None and answer.usage.completion_tokens == len(expected.ids)


def moved_by(cluster: Cluster) -> set[str]:
    """Transports that bytes of the last three-image request took."""
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=question([5, 6, 7]),  # type: ignore[arg-type]
        max_tokens=3,
    )
    spans = timeline(cluster.url, answer.id.removeprefix("chatcmpl-"))["spans"]
    reads = [span for span in spans if span["name"] in ("read", "kv_read")]
    assert sorted(span["item"] for span in reads if span["name"] == "read") == [0, 1, 2]
    assert all(span["nbytes"] > 0 for span in reads)
    return {span["transport"] for span in reads}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("chunk_tokens", [24, 512])
def test_epd_apart(models, transport: TransportName, chunk_tokens: int) -> None:  # type: ignore[no-untyped-def]
    folder, reference = models("qwen3_vl")
    with Cluster(folder, "E/P/D", transport, encoders=2, chunk_tokens=chunk_tokens) as cluster:
        check(cluster, reference)
        assert moved_by(cluster) == {transport}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("topology", ["E/P/D", "E/PD"])
def test_families(models, family: str, topology: str) -> None:  # type: ignore[no-untyped-def]
    folder, reference = models(family)
    with Cluster(folder, topology, chunk_tokens=40) as cluster:
        check(cluster, reference)


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("topology", ["E/P/D", "E/PD"])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("chunk_tokens", [16, 100, 512])
def test_full_matrix(  # type: ignore[no-untyped-def]
    models, family: str, topology: str, transport: TransportName, chunk_tokens: int
) -> None:
    folder, reference = models(family)
    with Cluster(folder, topology, transport, encoders=2, chunk_tokens=chunk_tokens) as cluster:
        check(cluster, reference)
        assert moved_by(cluster) == {transport}
