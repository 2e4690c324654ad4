"""Decode steps as they are captured, without a GPU: a graph's replay is the same computation again,
into the same memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.end_to_end.engine_driver import Case, Driver, Family
from tests.unit.test_flash_attention import _small_workspace, plain
from triptych.engine import graphs
from triptych.engine.flash_steps import DecodeStep
from triptych.engine.graphs import DecodeGraphs
from triptych.models.language import LanguageModel
from triptych.request import Sampling, TokenEvent

torch.set_num_threads(1)
DRAWN = Sampling(max_tokens=12, temperature=0.9, seed=5, logprobs=2)
__all__ = ["_small_workspace", "plain"]  # fixtures


class Replayed:
    """What is computed goes where the capture's result went: it is overwritten by the next."""

    def __init__(self, owner: DecodeGraphs, size: int, step: DecodeStep) -> None:
        self._compute = lambda: owner._compute(size, step)
        self.logits: Tensor = self._compute()
        self.n = 0

    def reset(self) -> None:
        self._compute = lambda: torch.empty(0)

    def replay(self) -> None:
        self.n += 1
        self.logits.copy_(self._compute())


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("qwen3_vl"), "qwen3_vl")


@pytest.fixture(scope="module")
def cases(family: Family) -> list[Case]:
    return [family.case("text", 0), family.case("one", 1), family.case("three", 3, n_text=20)]


@pytest.fixture(scope="module")
def drawn(family: Family, cases: list[Case]) -> list[TokenEvent]:
    """By torch's own attention, step by step."""
    with Driver(family.language, run_ahead="off") as driver:
        driver.add(cases[0], DRAWN)
        driver.finish("text")
        return driver.events("text")


@pytest.fixture
def captured(
    family: Family, monkeypatch: pytest.MonkeyPatch, plain: None
) -> Iterator[LanguageModel]:
    def capture(owner: DecodeGraphs, size: int, step: DecodeStep, pool: object) -> Any:
        step.load(())
        replayed = Replayed(owner, size, step)
        return graphs._Captured(replayed, step, replayed.logits)  # type: ignore[arg-type]

    monkeypatch.setattr(DecodeGraphs, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(family.language, "compiled", True)
    yield family.language


def replays(driver: Driver) -> int:
    found = driver.engine._runner.graphs
    assert found is not None
    return sum(each.graph.n for each in found._captured.values())  # type: ignore[attr-defined]


def test_what_they_hold_is_let_go_when_the_engine_ends(
    captured: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go: list[object] = []
    monkeypatch.setattr(Replayed, "reset", lambda each: let_go.append(each))
    with Driver(captured, max_sequences=8) as driver:
        found = driver.engine._runner.graphs
        assert found is not None and len(found._captured) == 4
        assert let_go == []
    assert len(let_go) == 4
    assert not found._captured and driver.engine._runner.graphs is None


@pytest.mark.parametrize("run_ahead", ["auto", "off"])
def test_the_engine_on_them_gives_the_answers_of_generate(
    drawn: list[TokenEvent], captured: LanguageModel, cases: list[Case], run_ahead: str
) -> None:
    """Three sequences in a graph of four."""
    with Driver(captured, chunk_tokens=32, max_sequences=8, run_ahead=run_ahead) as driver:
        for case in cases:
            driver.add(case)
        driver.finish(*(case.name for case in cases))
        assert driver.failed == {}
        assert [driver.answer(case.name) for case in cases] == [case.answer for case in cases]
        assert driver.engine._compute.runs_ahead == (run_ahead == "auto") and replays(driver) > 8
        stops = Sampling(max_tokens=12, temperature=0, stop_ids=(cases[1].answer[5],))
        driver.add(cases[0], DRAWN, name="drawn")
        driver.add(cases[1], stops, name="stops")
        driver.add(cases[2], Sampling(max_tokens=3, temperature=0), name="short")
        driver.finish("drawn", "stops", "short")
        n = cases[1].answer.index(cases[1].answer[5]) + 1
        assert driver.answer("stops") == cases[1].answer[:n]
        assert driver.answer("short") == cases[2].answer[:3]
        events = driver.events("drawn")
    assert [event.token for event in events] == [event.token for event in drawn]
    for event, expected in zip(events, drawn, strict=True):
        assert event.logprob == pytest.approx(expected.logprob, abs=1e-4)


def test_a_plan_is_made_once_for_each_step(captured: LanguageModel, cases: list[Case]) -> None:
    """When it is launched if steps are launched ahead, else as soon as the last one is."""
    counts = []
    for run_ahead in ("on", "off"):
        with Driver(captured, max_sequences=4, run_ahead=run_ahead) as driver:
            found = driver.engine._runner
            driver.add(cases[0])
            driver.finish("text")
            assert found.graphs is not None
            (wrapper,) = found.graphs._captured[1].step._wrappers.values()
            counts.append(wrapper.plans - replays(driver))
    assert counts == [1, 2], "besides the steps: the capture's, and one that was not needed"
