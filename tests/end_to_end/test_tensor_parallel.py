"""Two ranks, each with half of the heads, against Transformers' ``generate`` on the whole model and
against one rank: tokens equal, logits and log-probabilities within 1e-4, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.end_to_end.engine_driver import GREEDY, Case, Driver
from tests.end_to_end.ranked import RankedFamily
from tests.end_to_end.test_engine_preemption import preemptions, small
from triptych.demo.tiny import FAMILIES
from triptych.engine.messages import Cancel, ItemLanded, Lapsed, Proven
from triptych.engine.sequence import Trust
from triptych.errors import TransferFailed
from triptych.request import Sampling

torch.set_num_threads(1)
TOLERANCE = 1e-4
ALWAYS = "qwen3_vl"
OTHERS = sorted(set(FAMILIES) - {ALWAYS})
"""When the full matrices are run: a process takes seconds to start."""


@pytest.fixture(
    scope="module",
    params=[ALWAYS, *(pytest.param(name, marks=pytest.mark.full) for name in OTHERS)],
)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RankedFamily]:
    ranked = RankedFamily(tmp_path_factory.mktemp(request.param), request.param)
    yield ranked
    ranked.close()


@pytest.fixture(scope="module")
def cases(family: RankedFamily) -> list[Case]:
    return [family.case("text", 0), family.case("one", 1), family.case("three", 3, n_text=20)]


@pytest.fixture
def seen(family: RankedFamily) -> Iterator[list[Tensor]]:
    """Rows of logits in the order in which tokens were sampled."""
    rows: list[Tensor] = []
    original = family.first_rank.logits

    def logits(hidden: Tensor) -> Tensor:
        out = original(hidden)
        rows.extend(out.clone())
        return out

    with patch.object(family.first_rank, "logits", logits):
        yield rows


def check(driver: Driver, seen: list[Tensor], case: Case, name: str = "") -> None:
    """``seen`` holds a row for every token of ``driver``, in order."""
    name = name or case.name
    assert driver.failed == {}
    assert driver.answer(name) == case.answer
    rows = [row for row, event in zip(seen, driver.tokens, strict=True) if event.request_id == name]
    assert case.logits is not None
    torch.testing.assert_close(torch.stack(rows), case.logits, atol=TOLERANCE, rtol=0)


def test_each_rank_has_half_of_the_heads(family: RankedFamily) -> None:
    assert family.language.num_kv_heads == 2
    assert family.first_rank.num_kv_heads == 1
    assert family.first_rank.head_dim == family.language.head_dim
    whole, half = (
        sum(p.numel() for p in model._decoder.layers.parameters())
        for model in (family.language, family.first_rank)
    )
    assert half == pytest.approx(whole / 2, rel=0.02)  # norms are on both ranks


@pytest.mark.parametrize("chunk_tokens", [512, 7])
def test_requests_together(
    family: RankedFamily, cases: list[Case], seen: list[Tensor], chunk_tokens: int
) -> None:
    """Chunks of one prompt beside decodes of others."""
    with family.lead(chunk_tokens=chunk_tokens) as driver:
        names = [driver.add(case, name=f"{case.name} {i}") for i in range(2) for case in cases]
        driver.finish(*names)
        assert driver.free_blocks == driver.engine.kv.n_blocks
        for i in range(2):
            for case in cases:
                check(driver, seen, case, f"{case.name} {i}")
        assert driver.is_empty()


def test_drawn_answers_are_those_of_one_rank(family: RankedFamily, cases: list[Case]) -> None:
    # Of seeds by which no draw lies within rounding (2e-8, seen with 11) of two tokens' boundary.
    samplings = [
        Sampling(max_tokens=10, temperature=1.0, seed=21, logprobs=3),
        Sampling(max_tokens=10, temperature=0.8, top_p=0.9, seed=12, logprobs=3),
        Sampling(max_tokens=10, temperature=0, logprobs=3),
    ]

    def ask(driver: Driver) -> None:
        for number, sampling in enumerate(samplings):
            for case in cases:
                driver.add(case, sampling, name=f"{case.name} {number}")
        driver.finish(*(f"{case.name} {n}" for n in range(len(samplings)) for case in cases))

    with Driver(family.language, chunk_tokens=24) as one, family.lead(chunk_tokens=24) as two:
        ask(one)
        ask(two)
    assert one.failed == two.failed == {}
    for number in range(len(samplings)):
        for case in cases:
            name = f"{case.name} {number}"
            assert two.answer(name) == one.answer(name)
            for a, b in zip(one.events(name), two.events(name), strict=True):
                assert b.logprob == pytest.approx(a.logprob, abs=TOLERANCE)
                assert [each.token for each in b.top] == [each.token for each in a.top]
    assert one.answer("text 0") != one.answer("text 2"), "a draw differs from the likeliest"


def test_late_wrong_and_cancelled_images(
    family: RankedFamily, cases: list[Case], seen: list[Tensor]
) -> None:
    """Images land in another order while prompts run; rows that lapsed are landed once more, an
    embedding of the wrong shape fails its request alone, and a cancelled request leaves nothing."""
    case, one = cases[2], cases[1]
    with family.lead(chunk_tokens=8) as driver:
        driver.engine.submit(case.request())
        driver.engine.submit(ItemLanded(case.name, 2, case.rows[2]))
        wrong = torch.full_like(case.rows[0], 3.0)
        driver.engine.submit(ItemLanded(case.name, 0, wrong, trust=Trust.BORROWED))
        driver.until(lambda: any(output.used for output in driver.outputs))
        driver.engine.submit(Lapsed(case.name, 0))
        driver.engine.submit(ItemLanded(case.name, 0, case.rows[0]))
        driver.engine.submit(one.request(name="cancelled"))
        driver.engine.submit(ItemLanded("cancelled", 0, one.rows[0]))
        driver.engine.submit(Cancel("cancelled"))
        driver.engine.submit(one.request(name="refused"))
        driver.engine.submit(ItemLanded("refused", 0, one.rows[0][:, :-1]))
        driver.until(lambda: "refused" in driver.failed)
        driver.engine.submit(ItemLanded(case.name, 1, case.rows[1]))
        driver.finish(case.name)
        assert driver.answer(case.name) == case.answer
        assert isinstance(driver.failed["refused"], TransferFailed)
        assert driver.is_empty()


def test_preempted(family: RankedFamily, cases: list[Case]) -> None:
    """The youngest give their blocks away and are computed again, in others, on every rank."""
    n_blocks = small(cases, GREEDY.max_tokens, 2)
    with family.lead(n_blocks=n_blocks, chunk_tokens=16) as driver:
        names = {f"{case.name} {i}": case for i in range(2) for case in cases}
        names |= {f"more {i}": cases[0] for i in range(n_blocks // 4)}
        for name, case in names.items():
            driver.add(case, name=name)
        driver.finish(*names)
        assert driver.failed == {} and preemptions(driver) > 0
        assert all(driver.answer(name) == case.answer for name, case in names.items())
        assert driver.is_empty()


def test_found_again(family: RankedFamily, cases: list[Case]) -> None:
    """Blocks of an earlier prompt are there on every rank."""
    spans = tuple(replace(span, key=f"image {i}") for i, span in enumerate(cases[2].spans))
    case = replace(cases[2], spans=spans)
    with family.lead(chunk_tokens=24) as driver:
        for name in ("first", "again"):
            driver.add(case, name=name)
            driver.finish(name)
            assert driver.answer(name) == case.answer
        assert driver.notes("first", "prefill")[0].startswith("tokens 0..")
        assert not driver.notes("again", "prefill")[0].startswith("tokens 0..")


def test_borrowed_rows_count_once_they_are_proven(family: RankedFamily, cases: list[Case]) -> None:
    case = cases[1]
    with family.lead() as driver:
        driver.engine.submit(case.request())
        driver.engine.submit(ItemLanded(case.name, 0, case.rows[0], trust=Trust.BORROWED))
        driver.until(lambda: any(output.used for output in driver.outputs))
        assert driver.answer(case.name) == []
        for output in driver.outputs:
            for used in output.used:
                driver.engine.submit(Proven(used.request_id, used.serial))
        driver.finish(case.name)
        assert driver.answer(case.name) == case.answer


def test_an_answer_that_another_worker_began(family: RankedFamily, cases: list[Case]) -> None:
    case = cases[2]
    with family.lead(chunk_tokens=16) as driver:
        request = case.request(GREEDY)
        resumed = tuple(case.answer[:5])
        driver.engine.submit(
            type(request)(case.name, request.token_ids, request.items, GREEDY, resumed=resumed)
        )
        for item, rows in enumerate(case.rows):
            driver.engine.submit(ItemLanded(case.name, item, rows))
        driver.finish(case.name)
        assert driver.answer(case.name) == case.answer[5:]
