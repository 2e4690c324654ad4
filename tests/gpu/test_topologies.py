"""Every arrangement on a GPU gives the CPU's answer, in float32."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.end_to_end.cluster import Cluster, timeline
from tests.end_to_end.reference import Expected, Reference, question
from triptych.config import TransportName
from triptych.demo.tiny import make_tiny_model
from triptych.transfer.transports.mooncake import has_nvlink

MAX_TOKENS = 12
TOLERANCE = 1e-3
TEXT = "Tell me about the pictures."
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    root = tmp_path_factory.mktemp("models")

    @cache
    def model(family: str) -> tuple[Path, Reference]:
        folder = make_tiny_model(root / family, family)
        return folder, Reference(folder, DEVICE)

    yield model


def ask(url: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
    body = {
        "model": "model",
        "messages": messages,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "logprobs": True,
    }
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
        body["model"] = json.load(answer)["data"][0]["id"]
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.load(answer))


def compare(answer: dict[str, Any], expected: Expected) -> None:
    choice = answer["choices"][0]
    got = choice["logprobs"]["content"]
    assert choice["message"]["content"] == expected.text
    assert len(got) == len(expected.ids)
    gaps = [
        abs(token["logprob"] - expected.logprobs[i][expected.ids[i]].item())
        for i, token in enumerate(got)
    ]
    assert max(gaps) < TOLERANCE, gaps


def check(url: str, reference: Reference) -> set[str]:
    """Greedy answers with 0, 1 and 3 images; the transports their bytes took."""
    moved: set[str] = set()
    for seeds in ([], [0], [1, 2, 3]):
        expected = reference.answer(seeds, TEXT, MAX_TOKENS)
        answer = ask(url, question(seeds, TEXT))
        compare(answer, expected)
        spans = timeline(url, answer["id"].removeprefix("chatcmpl-"))["spans"]
        moved |= {span["transport"] for span in spans if span["name"] in ("read", "kv_read")}
    return moved


@pytest.mark.parametrize("transport", ["http", "shm", "mooncake", "auto"])
@pytest.mark.parametrize("chunk_tokens", [24, 512])
def test_epd_apart(models, transport: TransportName, chunk_tokens: int) -> None:  # type: ignore[no-untyped-def]
    if transport == "mooncake" and not has_nvlink():
        pytest.skip("no Mooncake package with NVLink")
    folder, reference = models("qwen3_vl")
    expected = {"mooncake" if has_nvlink() else "shm"} if transport == "auto" else {transport}
    with Cluster(
        folder,
        transport=transport,
        encoders=2,
        chunk_tokens=chunk_tokens,
        device=DEVICE,
        dtype="float32",
    ) as cluster:
        assert check(cluster.url, reference) == expected


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "internvl"])
@pytest.mark.parametrize("topology", ["E/P/D", "E/PD"])
def test_families(models, family: str, topology: str) -> None:  # type: ignore[no-untyped-def]
    folder, reference = models(family)
    with Cluster(
        folder, topology, "http", chunk_tokens=40, device=DEVICE, dtype="float32"
    ) as cluster:
        check(cluster.url, reference)


def test_bfloat16_answers(models) -> None:  # type: ignore[no-untyped-def]
    folder, _ = models("qwen3_vl")
    with Cluster(folder, transport="http", device=DEVICE, dtype="bfloat16") as cluster:
        answer = ask(cluster.url, question([1, 2], TEXT))
        assert answer["usage"]["completion_tokens"] >= 1
