"""Answers that another worker began: what exists is computed with the prompt, the rest is equal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.end_to_end.engine_driver import GREEDY, Case, Driver, Family
from tests.families import EVERY
from triptych.engine.messages import ItemLanded, Reserve, StartDecode
from triptych.errors import BadRequest
from triptych.request import Sampling

torch.set_num_threads(1)
SEEDED = Sampling(max_tokens=12, temperature=0.9, top_p=0.9, seed=11, logprobs=5)


@pytest.fixture(scope="module", params=EVERY)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def case(family: Family) -> Case:
    return family.case("images", 2)


def resume(
    driver: Driver,
    case: Case,
    name: str,
    done: list[int],
    sampling: Sampling = GREEDY,
    *,
    keep_kv: bool = False,
) -> None:
    request = case.request(sampling, name=name, keep_kv=keep_kv)
    driver.engine.submit(replace(request, resumed=tuple(done)))
    for item, rows in enumerate(case.rows):
        driver.engine.submit(ItemLanded(name, item, rows))


@pytest.mark.parametrize("n_done", [1, 5, 11])
def test_the_rest_of_the_answer_is_the_same(family: Family, case: Case, n_done: int) -> None:
    with Driver(family.language, chunk_tokens=16) as driver:
        resume(driver, case, "again", case.answer[:n_done])
        driver.finish("again")
        events = driver.events("again")
        assert [event.token for event in events] == case.answer[n_done:]
        assert [event.index for event in events] == list(range(n_done, 12))
        assert events[-1].finish == "length"
        assert driver.is_empty()


def test_draws_and_probabilities_go_on_as_well(family: Family, case: Case) -> None:
    with Driver(family.language, chunk_tokens=24) as driver:
        driver.add(case, SEEDED, name="whole")
        driver.finish("whole")
        whole = driver.events("whole")
        resume(driver, case, "again", driver.answer("whole")[:4], sampling=SEEDED)
        driver.finish("again")
        for before, after in zip(whole[4:], driver.events("again"), strict=True):
            assert (before.token, before.index) == (after.token, after.index)
            assert before.logprob == pytest.approx(after.logprob, abs=1e-4)
            assert [x.token for x in before.top] == [x.token for x in after.top]


@pytest.mark.parametrize("n_done", [1, 7])
def test_prefilled_at_one_engine_and_decoded_at_another(
    family: Family, case: Case, n_done: int
) -> None:
    done = case.answer[:n_done]
    with Driver(family.language, chunk_tokens=16) as prefill, Driver(family.language) as decode:
        resume(prefill, case, "r", done, keep_kv=True)
        prefill.until(lambda: "r" in prefill.prefilled)
        result = prefill.prefilled["r"]
        assert (result.first.token, result.first.index) == (case.answer[n_done], n_done)
        n_kv = len(case.token_ids) + n_done
        decode.engine.submit(Reserve("r", len(case.token_ids) + GREEDY.max_tokens))
        decode.until(lambda: "r" in decode.reserved)
        blocks = prefill.progress["r"][-1].blocks
        for source, target in zip(blocks, decode.reserved["r"], strict=False):
            decode.engine.kv.data[target] = prefill.engine.kv.data[source]
        decode.engine.submit(
            StartDecode("r", n_kv, result.first, result.next_position, GREEDY, tuple(done))
        )
        decode.finish("r")
        assert decode.answer("r") == case.answer[n_done + 1 :]


def test_more_than_the_answer_may_have_is_refused(family: Family, case: Case) -> None:
    with Driver(family.language) as driver:
        resume(driver, case, "full", case.answer)
        driver.finish("full")
        assert isinstance(driver.failed["full"], BadRequest)
        resume(driver, case, "strange", [10**9])
        driver.finish("strange")
        assert isinstance(driver.failed["strange"], BadRequest)
