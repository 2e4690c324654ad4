"""Every topology gives Transformers' own answer: tokens and logits, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import torch

from tests.end_to_end.checks import check, moved_by
from tests.end_to_end.cluster import Cluster
from tests.end_to_end.reference import Reference
from triptych.config import TransportName
from triptych.demo.tiny import make_tiny_model

FAMILIES = ("qwen3_vl", "qwen2_5_vl", "llava_onevision", "internvl")
TRANSPORTS = [name for name in get_args(TransportName) if name != "auto"]


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


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("chunk_tokens", [24, 512])
def test_epd_apart(models, transport: TransportName, chunk_tokens: int) -> None:  # type: ignore[no-untyped-def]
    folder, reference = models("qwen3_vl")
    with Cluster(folder, "E/P/D", transport, encoders=2, chunk_tokens=chunk_tokens) as cluster:
        check(cluster.url, reference)
        assert moved_by(cluster.url) == {transport}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("topology", ["E/P/D", "E/PD"])
def test_families(models, family: str, topology: str) -> None:  # type: ignore[no-untyped-def]
    folder, reference = models(family)
    with Cluster(folder, topology, chunk_tokens=40) as cluster:
        check(cluster.url, reference)


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
        check(cluster.url, reference)
        assert moved_by(cluster.url) == {transport}
