"""Every topology gives Transformers' own answer: tokens and logits, in float32."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

from tests.end_to_end.checks import check, moved_by, tokens
from tests.end_to_end.cluster import Cluster
from tests.end_to_end.reference import Reference
from tests.families import CORE
from triptych.config import TransportName
from triptych.demo.tiny import make_tiny_model

TRANSPORTS = [name for name in get_args(TransportName) if name != "auto"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    root = tmp_path_factory.mktemp("models")

    @cache
    def model(family: str) -> tuple[Path, Reference]:
        folder = make_tiny_model(root / family, family)
        return folder, Reference(folder)

    yield model


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("chunk_tokens", [24, 512])
def test_epd_apart(models, transport: TransportName, chunk_tokens: int) -> None:  # type: ignore[no-untyped-def]
    folder, reference = models("qwen3_vl")
    with Cluster(folder, "E/P/D", transport, encoders=2, chunk_tokens=chunk_tokens) as cluster:
        check(cluster.url, reference)
        assert moved_by(cluster.url) == {transport}


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("topology", ["E/P/D", "E/PD"])
def test_families(models, family: str, topology: str) -> None:  # type: ignore[no-untyped-def]
    folder, reference = models(family)
    with Cluster(folder, topology, chunk_tokens=40) as cluster:
        check(cluster.url, reference)


def test_seeded_sampling_is_the_same_everywhere(models) -> None:  # type: ignore[no-untyped-def]
    """A draw depends on seed and position, not on who computes it or what runs beside it."""
    folder, _ = models("qwen3_vl")
    sampling = {"temperature": 0.9, "top_p": 0.9, "top_k": 50}
    answers = []
    for topology, chunk_tokens in (("E/P/D", 24), ("E/PD", 512)):
        with Cluster(folder, topology, chunk_tokens=chunk_tokens) as cluster:
            answers.append([tokens(cluster.url, [4, 5], seed=s, **sampling) for s in (7, 7, 8)])
    assert answers[0] == answers[1]
    assert answers[0][0] == answers[0][1] != answers[0][2]


def test_random_weights_from_a_configuration_alone(  # type: ignore[no-untyped-def]
    models, tmp_path: Path
) -> None:
    """Every process makes the same weights, whichever half it has."""
    folder, _ = models("qwen3_vl")
    shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors*"))
    answers = []
    for topology in ("E/P/D", "E/PD"):
        with Cluster(tmp_path / "bare", topology, load_format="dummy") as cluster:
            answers.append(tokens(cluster.url, [1, 2]))
    assert answers[0] == answers[1]
    assert len(answers[0]) > 1


@pytest.mark.full
@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("topology", ["E/P/D", "E/PD"])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("chunk_tokens", [16, 100, 512])
def test_full_matrix(  # type: ignore[no-untyped-def]
    models, family: str, topology: str, transport: TransportName, chunk_tokens: int
) -> None:
    folder, reference = models(family)
    with Cluster(folder, topology, transport, encoders=2, chunk_tokens=chunk_tokens) as cluster:
        check(cluster.url, reference)
        assert moved_by(cluster.url) == {transport}
