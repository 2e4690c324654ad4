"""Real processes, as ``triptych serve`` starts them, give the single model's own answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.end_to_end.checks import check, moved_by
from tests.end_to_end.reference import Reference
from tests.end_to_end.served import Served
from triptych.demo.tiny import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Reference]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "qwen3_vl", "qwen3_vl")
    yield folder, Reference(folder)
    torch.set_num_threads(threads)


@pytest.fixture(scope="class")
def served(model: tuple[Path, Reference]) -> Iterator[Served]:
    with Served(model[0], "E/P/D", ("--encoders", "2")) as running:
        yield running


class TestApart:
    """Of one deployment, in this order: every process takes seconds to start."""

    def test_encoders_prefill_and_decode(
        self, model: tuple[Path, Reference], served: Served
    ) -> None:
        roles = ("router", "encoder", "prefill", "decode")
        assert [len(served.workers(role)) for role in roles] == [1, 2, 1, 1]
        check(served.url, model[1])
        assert moved_by(served.url) == {"shm"}

    def test_killed_workers_come_back(self, model: tuple[Path, Reference], served: Served) -> None:
        """The router goes on; an encoder that is gone is done without, the others are waited
        for."""
        check(served.url, model[1])
        served.workers("encoder")[0].kill()
        check(served.url, model[1])
        for role in ("prefill", "decode"):
            (worker,) = served.workers(role)
            worker.kill()
            worker.wait(10)
        served.wait()
        check(served.url, model[1])
        assert moved_by(served.url) == {"shm"}


@pytest.mark.parametrize(
    ("topology", "options", "transports"),
    [
        ("E/P/D", ("--transport", "http", "--chunk-tokens", "24"), {"http"}),
        ("E/P/D", ("--transport", "mooncake"), {"mooncake"}),
        ("E/PD", (), {"shm"}),
        ("E+PD", ("--languages", "2"), {"shm"}),
        ("EPD", (), {"shm"}),
    ],
)
def test_topologies_and_transports(
    model: tuple[Path, Reference], topology: str, options: tuple[str, ...], transports: set[str]
) -> None:
    folder, reference = model
    with Served(folder, topology, options) as served:
        check(served.url, reference)
        assert moved_by(served.url) == transports
