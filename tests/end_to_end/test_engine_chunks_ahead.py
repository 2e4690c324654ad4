"""Chunks of prompts that are launched while the step before them is nearly over."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.end_to_end.engine_driver import GREEDY, Case, Family
from tests.end_to_end.turns import Turns
from triptych.engine.messages import Cancel
from triptych.request import Sampling

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("qwen3_vl"), "qwen3_vl")


@pytest.fixture(scope="module")
def cases(family: Family) -> list[Case]:
    return [family.case("text", 0), family.case("two", 2)]


class Nearly:
    """Says when the engine waits for the end of a chunk."""

    def __init__(self, then: Callable[[], object]) -> None:
        self.wait = then


def test_a_chunk_is_launched_before_the_last_one_is_read(family: Family, cases: list[Case]) -> None:
    two = cases[1]
    waits: list[str] = []
    with Turns(family, "on", chunk_tokens=8) as driver:
        driver.engine._runner._attention.nearly = Nearly(lambda: waits.append("for a chunk"))
        driver.add(two, Sampling(max_tokens=2, temperature=0))
        driver.turns()
    assert driver.answer("two") == two.answer[:2]
    calls = [call for call, work in driver.calls if not work[0].is_decode]
    n_chunks = calls.count("read")
    assert n_chunks > 2 and calls.count("launch") == 1
    assert calls[:3] == ["launch", "ahead", "read"] and len(waits) == n_chunks - 1


def test_whoever_comes_before_a_chunk_is_nearly_over_is_let_in(
    family: Family, cases: list[Case]
) -> None:
    text, two = cases
    with Turns(family, "on", chunk_tokens=16) as driver:
        driver.engine._runner._attention.nearly = Nearly(lambda: driver.add(text))
        driver.add(two)
        driver.turn()
        driver.engine._runner._attention.nearly = None
        assert [call for call, _ in driver.calls] == ["launch", "read"]
        driver.turn()
        assert {w.sequence.request_id for w in driver.calls[2][1]} == {"text", "two"}
        driver.turns()
        assert driver.answer("two") == two.answer and driver.answer("text") == text.answer


@pytest.mark.parametrize("what", ["cancel", "close"])
def test_an_end_before_a_chunk_is_nearly_over(family: Family, cases: list[Case], what: str) -> None:
    two = cases[1]
    with Turns(family, "on", chunk_tokens=16) as driver:
        message = Cancel("two") if what == "cancel" else None
        driver.engine._runner._attention.nearly = Nearly(lambda: driver.engine._inbox.put(message))
        driver.add(two)
        driver.turn()
        assert [call for call, _ in driver.calls] == ["launch", "read"]
        assert driver.engine._take_messages(wait=False) == (what == "cancel")
        if what == "cancel":
            assert driver.free_blocks == driver.engine.kv.n_blocks


def test_a_device_that_fails_meanwhile_fails_the_step_and_no_more(
    family: Family, cases: list[Case]
) -> None:
    text, two = cases
    with Turns(family, "on", chunk_tokens=16) as driver:

        def broken() -> None:
            driver.engine._runner._attention.nearly = None
            raise RuntimeError("a device error")

        driver.engine._runner._attention.nearly = Nearly(broken)
        driver.add(two)
        driver.turns()
        assert "a device error" in driver.failed["two"].message
        assert [call for call, _ in driver.calls] == ["launch", "read"]
        driver.add(text)
        driver.turns()
        assert driver.answer("text") == text.answer
        assert driver.free_blocks == driver.engine.kv.n_blocks


def test_decodes_go_on_with_the_chunks(family: Family, cases: list[Case]) -> None:
    text, two = cases
    waits: list[int] = []
    with Turns(family, "on", chunk_tokens=8) as driver:
        driver.add(text, GREEDY)
        driver.turns(lambda: len(driver.answer("text")) == 2)
        driver.engine._runner._attention.nearly = Nearly(lambda: waits.append(len(driver.calls)))
        driver.add(two, GREEDY)
        driver.calls.clear()
        driver.turns()
    both = [call for call, work in driver.calls if len(work) == 2 and not work[1].is_decode]
    assert both.count("ahead") >= 2 and len(waits) >= both.count("ahead")
    assert driver.answer("two") == two.answer and driver.answer("text") == text.answer


def test_a_decode_that_stops_leaves_the_chunk_behind_it_alone(
    family: Family, cases: list[Case]
) -> None:
    """Its row of the step behind is computed for nobody."""
    text, two = cases
    stop = text.answer[4]
    n = text.answer.index(stop) + 1
    with Turns(family, "on", chunk_tokens=8) as driver:
        driver.add(text, Sampling(max_tokens=12, temperature=0, stop_ids=(stop,)))
        driver.turns(lambda: len(driver.answer("text")) == 2)
        driver.add(two, GREEDY)
        driver.turns()
        assert driver.answer("text") == text.answer[:n] and driver.thrown_away == 1
        assert driver.answer("two") == two.answer
        assert driver.free_blocks == driver.engine.kv.n_blocks
