"""Sequences that had to give their blocks away and were computed again: nobody sees it."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
import torch

from tests.end_to_end.engine_driver import Case, Driver, Family
from tests.families import EVERY
from tests.unit.test_flash_attention import _small_workspace, plain
from triptych.engine.messages import Cancel, ItemLanded, Lapsed, Proven, Reserve, Used
from triptych.engine.sequence import Trust
from triptych.request import Sampling, TokenEvent

torch.set_num_threads(1)
SEEDED = Sampling(max_tokens=40, temperature=0.9, top_p=0.9, seed=11, logprobs=3)
LONG = Sampling(max_tokens=40, temperature=0)
__all__ = ["_small_workspace", "plain"]  # fixtures


@pytest.fixture(scope="module", params=EVERY)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def cases(family: Family) -> list[Case]:
    return [family.case("text", 0), family.case("one", 1), family.case("two", 2)]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("qwen"), "qwen3_vl")


@pytest.fixture(scope="module")
def images(qwen: Family) -> Case:
    return qwen.case("images", 3)


def preemptions(driver: Driver) -> int:
    return sum(span.name == "preempted" for spans in driver.spans.values() for span in spans)


def alone(family: Family, case: Case, sampling: Sampling) -> list[TokenEvent]:
    with Driver(family.language) as driver:
        driver.add(case, sampling)
        driver.finish(case.name)
        return driver.events(case.name)


def assert_same(got: list[TokenEvent], expected: list[TokenEvent]) -> None:
    assert [(e.index, e.token, e.finish) for e in got] == [
        (e.index, e.token, e.finish) for e in expected
    ]
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [x.token for x in mine.top] == [x.token for x in theirs.top]


def small(cases: list[Case], answer: int, more: int) -> int:
    """Blocks of four tokens: the largest request alone and ``more``."""
    return -(-(max(len(case.token_ids) for case in cases) + answer) // 4) + more


@pytest.mark.parametrize("chunk_tokens", [512, 16])
def test_the_answers_of_generate(family: Family, cases: list[Case], chunk_tokens: int) -> None:
    n_blocks = small(cases, 12, 2)
    with Driver(family.language, n_blocks=n_blocks, block_size=4, chunk_tokens=chunk_tokens) as d:
        names = {f"{case.name} {i}": case for i in range(2) for case in cases}
        names |= {f"more {i}": cases[0] for i in range(n_blocks // 4)}
        for name, case in names.items():
            d.add(case, name=name)
        d.finish(*names)
        assert d.failed == {} and preemptions(d) > 0
        assert all(d.answer(name) == case.answer for name, case in names.items())
        assert d.is_empty()


@pytest.mark.parametrize("sampling", [SEEDED, LONG])
def test_draws_and_probabilities_are_the_same(
    family: Family, cases: list[Case], sampling: Sampling
) -> None:
    text, image, _ = cases
    expected = {case.name: alone(family, case, sampling) for case in (text, image)}
    n_blocks = small([text, image], sampling.max_tokens, 2)
    with Driver(family.language, n_blocks=n_blocks, block_size=4, chunk_tokens=24) as driver:
        names = {"image": image, **{f"text {i}": text for i in range(n_blocks // 4)}}
        for name, case in names.items():
            driver.add(case, sampling, name=name)
        driver.finish(*names)
        assert preemptions(driver) > 0
        for name, case in names.items():
            assert_same(driver.events(name), expected[case.name])
        assert driver.is_empty()


@pytest.mark.usefixtures("plain")
def test_by_the_kernels_of_a_gpu(qwen: Family, images: Case) -> None:
    """Tables grow and begin anew there too."""
    with Driver(
        qwen.language, n_blocks=small([images], 40, 14), block_size=4, chunk_tokens=24
    ) as driver:
        names = [driver.add(images, LONG, name=str(i)) for i in range(3)]
        driver.finish(*names)
        assert preemptions(driver) > 0
        expected = [event.token for event in alone(qwen, images, LONG)]
        assert all(driver.answer(name) == expected for name in names)


def test_every_landing_is_given_back_once(qwen: Family, images: Case) -> None:
    """Counted by hand: what lands, what comes back, and that nothing lands where rows are."""
    with Driver(
        qwen.language, n_blocks=small([images], 40, 14), block_size=4, chunk_tokens=24
    ) as driver:
        landed: list[tuple[str, int]] = []
        there: set[tuple[str, int]] = set()
        for i in range(3):
            driver.engine.submit(images.request(LONG, name=str(i)))
        seen = 0
        while not all(driver.ended(str(i)) for i in range(3)):
            driver._take(driver._outputs.get(timeout=20))
            for output in driver.outputs[seen:]:
                for key in output.consumed:
                    there.remove(key)
                for name, item in output.wanted:
                    assert (name, item) not in there
                    there.add((name, item))
                    landed.append((name, item))
                    driver.engine.submit(ItemLanded(name, item, images.rows[item].clone()))
            seen = len(driver.outputs)
        assert driver.is_empty()
        assert preemptions(driver) > 0 and len(landed) > 9 and not there
        assert sorted(driver.consumed) == sorted(landed)


@pytest.mark.parametrize("seed", range(4))
def test_borrowed_rows_that_lapse_meanwhile(qwen: Family, images: Case, seed: int) -> None:
    """Three requests that push each other out, rows in place that are wrong now and then, answers
    that come late: the tokens are those of a calm day."""
    draw = Random(seed)
    expected = [event.token for event in alone(qwen, images, LONG)]
    wrong_left = {(str(r), item): draw.randrange(2) for r in range(3) for item in range(3)}
    lent: dict[tuple[str, int], bool] = {}
    with Driver(
        qwen.language, n_blocks=small([images], 40, 14), block_size=4, chunk_tokens=16
    ) as driver:

        def lend(name: str, item: int) -> None:
            key = name, item
            wrong = wrong_left[key] > 0
            wrong_left[key] -= wrong
            lent[key] = wrong
            rows = torch.full_like(images.rows[item], 3.0) if wrong else images.rows[item]
            driver.engine.submit(ItemLanded(name, item, rows, trust=Trust.BORROWED))

        for i in range(3):
            driver.engine.submit(images.request(LONG, name=str(i)))
        asked: list[Used] = []
        seen = 0
        while not all(driver.ended(str(i)) for i in range(3)):
            driver._take(driver._outputs.get(timeout=20))
            for output in driver.outputs[seen:]:
                for key in output.consumed:
                    del lent[key]
                for key in output.wanted:
                    lend(*key)
                asked += output.used
            seen = len(driver.outputs)
            draw.shuffle(asked)
            for used in asked[: draw.randrange(len(asked) + 1)] if len(asked) < 4 else asked[:]:
                asked.remove(used)
                keys = [(used.request_id, item) for item in used.items]
                if any(key not in lent for key in keys):
                    continue
                for key in keys:
                    if lent[key]:
                        driver.engine.submit(Lapsed(*key))
                        lend(*key)
                        break
                else:
                    driver.engine.submit(Proven(used.request_id, used.serial))
            driver.engine.submit(Cancel("nobody"))  # it may have nothing else to say
        assert preemptions(driver) > 0
        assert all(driver.answer(str(i)) == expected for i in range(3))
        assert not lent and driver.is_empty()


def test_kv_that_is_lent_stays_where_and_what_it_is(qwen: Family, images: Case) -> None:
    """Answers that want every block beside a prompt whose KV a consumer reads while it grows."""
    n_blocks = small([images], 0, 8)
    with Driver(qwen.language, n_blocks=n_blocks, block_size=4, chunk_tokens=16) as driver:
        text = qwen.case("text", 0)
        driver.add(text, LONG, name="answer")
        driver.until(lambda: len(driver.answer("answer")) > 2)
        driver.add(images, name="kept", keep_kv=True)
        copies: dict[int, torch.Tensor] = {}
        memory = driver.engine.kv.data
        while "kept" not in driver.prefilled:
            driver._take(driver._outputs.get(timeout=20))
            for progress in driver.progress["kept"]:
                for block in progress.blocks:
                    copies.setdefault(block, memory[block].clone())
        blocks = driver.progress["kept"][-1].blocks
        assert list(copies) == list(blocks)[: len(copies)]
        assert driver.answer("kept") == images.answer[:1]
        driver.add(text, name="more")  # there is no room for its whole answer either
        driver.until(lambda: len(driver.answer("answer")) > 16)
        for block, copy in copies.items():
            assert torch.equal(memory[block], copy)
        assert not driver.ended("answer")
        driver.engine.submit(Cancel("kept"))
        driver.finish("answer", "more")
        assert driver.answer("answer") == [event.token for event in alone(qwen, text, LONG)]
        assert driver.is_empty()


def test_cancels_and_preemptions_at_random(qwen: Family, images: Case) -> None:
    random = Random(5)
    text = qwen.case("text", 0)
    expected = {
        case.name: [event.token for event in alone(qwen, case, LONG)] for case in (text, images)
    }
    with Driver(
        qwen.language, n_blocks=small([images], 40, 16), block_size=4, chunk_tokens=24
    ) as driver:
        cases = {str(i): random.choice([text, images]) for i in range(16)}
        cancelled = random.sample(sorted(cases), 6)
        driver.engine.submit(Reserve("granted", 30))
        for name, case in cases.items():
            driver.add(case, LONG, name=name)
        for name in cancelled:
            outputs = len(driver.outputs) + random.randrange(12)
            driver.until(lambda: len(driver.outputs) >= outputs)  # noqa: B023
            driver.engine.submit(Cancel(name))
        driver.engine.submit(Cancel("granted"))
        survivors = [name for name in cases if name not in cancelled]
        driver.finish(*survivors)
        assert preemptions(driver) > 0
        assert all(driver.answer(name) == expected[cases[name].name] for name in survivors)
        assert driver.is_empty()


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    yield
    torch.compiler.reset()
