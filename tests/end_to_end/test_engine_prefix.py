"""KV that was found instead of computed: the same tokens and probabilities, and no image read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest
import torch

from tests.end_to_end.engine_driver import GREEDY, Case, Driver, Family
from tests.end_to_end.test_engine_preemption import assert_same, preemptions
from tests.families import CORE
from triptych.engine.messages import AddRequest, Cancel, ItemLanded, Lapsed, Proven, Used
from triptych.engine.sequence import Trust
from triptych.request import Sampling, TokenEvent

torch.set_num_threads(1)
SEEDED = Sampling(max_tokens=12, temperature=0.9, top_p=0.9, seed=11, logprobs=3)
SIZE = 4


def keyed(case: Case, *keys: str) -> Case:
    """The request with its images' content keys."""
    keys = keys or tuple(f"{case.name} {i}" for i in range(len(case.spans)))
    spans = tuple(replace(s, key=k) for s, k in zip(case.spans, keys, strict=True))
    return replace(case, spans=spans)


@pytest.fixture(scope="module", params=(*CORE, "gemma3"))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def case(family: Family) -> Case:
    return keyed(family.case("images", 2))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("qwen"), "qwen3_vl")


@pytest.fixture(scope="module")
def images(qwen: Family) -> Case:
    return keyed(qwen.case("images", 3))


@pytest.fixture
def driver(qwen: Family) -> Iterator[Driver]:
    with Driver(qwen.language, chunk_tokens=16, block_size=SIZE) as running:
        yield running


def begin(driver: Driver, name: str) -> int:
    """First token that was computed for the request."""
    return min(int(note.split()[1].split("..")[0]) for note in driver.notes(name, "prefill"))


def uncached(
    family: Family, request: AddRequest, rows: tuple[torch.Tensor, ...]
) -> list[TokenEvent]:
    with Driver(family.language, prefix_cache=False) as driver:
        driver.engine.submit(request)
        for item, each in enumerate(rows):
            driver.engine.submit(ItemLanded(request.request_id, item, each))
        driver.finish(request.request_id)
        return driver.events(request.request_id)


def needless(driver: Driver) -> list[tuple[str, int]]:
    return [each for output in driver.outputs for each in output.needless]


@pytest.mark.parametrize("chunk_tokens", [512, 7])
def test_the_same_prompt_again(family: Family, case: Case, chunk_tokens: int) -> None:
    """All but its last tokens is found; no image lands, and none is asked for."""
    expected = uncached(family, case.request(SEEDED, name="calm"), case.rows)
    with Driver(family.language, chunk_tokens=chunk_tokens, block_size=SIZE) as driver:
        driver.add(case)
        driver.finish("images")
        driver.engine.submit(case.request(name="again"))
        driver.engine.submit(case.request(SEEDED, name="drawn"))
        driver.finish("again", "drawn")
        found = (len(case.token_ids) - 1) // SIZE * SIZE
        assert begin(driver, "again") == begin(driver, "drawn") == found
        assert driver.answer("images") == driver.answer("again") == case.answer
        assert_same(driver.events("drawn"), expected)
        assert needless(driver) == [(name, i) for name in ("again", "drawn") for i in (0, 1)]
        assert driver.consumed == [("images", 0), ("images", 1)]
        assert driver.is_empty()


def test_the_next_turn_of_a_chat(family: Family, case: Case) -> None:
    """Images and answer of the first turn are found; those of the second are read."""
    more = keyed(family.case("more", 1))
    ids = (*case.token_ids, *case.answer, *more.token_ids)
    request = AddRequest("second", ids, (*case.spans, *more.spans), SEEDED)
    expected = uncached(family, request, (*case.rows, *more.rows))
    with Driver(family.language, chunk_tokens=24, block_size=SIZE) as driver:
        driver.add(case)
        driver.finish("images")
        driver.engine.submit(request)
        driver.engine.submit(ItemLanded("second", 2, more.rows[0]))
        driver.finish("second")
        # The KV of the answer's last token was never computed.
        assert begin(driver, "second") == (len(case.token_ids) + 11) // SIZE * SIZE
        assert_same(driver.events("second"), expected)
        assert needless(driver) == [("second", 0), ("second", 1)]
        assert driver.is_empty()


def test_without_it_nothing_is_found(qwen: Family, images: Case) -> None:
    with Driver(qwen.language, prefix_cache=False) as driver:
        for name in ("one", "two"):
            driver.add(images, name=name)
            driver.finish(name)
        assert begin(driver, "two") == 0 and needless(driver) == []
        assert driver.engine.usage["cached"] == 0


def test_another_image_behind_the_same_tokens(qwen: Family, driver: Driver, images: Case) -> None:
    """Found up to the first image that differs, and its own answer comes out."""
    other = replace(
        images,
        spans=(images.spans[0], replace(images.spans[1], key="other"), images.spans[2]),
        rows=(images.rows[0], -images.rows[1], images.rows[2]),
    )
    expected = uncached(qwen, other.request(SEEDED, name="calm"), other.rows)
    driver.add(images)
    driver.finish("images")
    driver.add(other, SEEDED, name="other")
    driver.finish("other")
    assert_same(driver.events("other"), expected)
    first = driver.engine.model.image_token_id
    second_image = [i for i, t in enumerate(images.token_ids) if t == first][images.spans[0].rows]
    assert begin(driver, "other") == second_image // SIZE * SIZE
    assert driver.is_empty()


def test_what_was_found_is_lent_to_a_consumer_at_once(driver: Driver, images: Case) -> None:
    """Before its last image has landed and anything is computed; two lend the same blocks."""
    driver.add(images, keep_kv=True)
    driver.until(lambda: "images" in driver.prefilled)
    image = driver.engine.model.image_token_id
    n = len(images.token_ids) // SIZE
    lent = driver.progress["images"][-1].blocks[:n]
    ids = (*images.token_ids, *images.token_ids[:5], *[image] * images.spans[0].rows, 5)
    spans = (*images.spans, replace(images.spans[0], key="late"))
    driver.engine.submit(AddRequest("longer", ids, spans, GREEDY, keep_kv=True))
    driver.until(lambda: bool(driver.progress["longer"]))
    first = driver.progress["longer"][0]
    assert (first.computed, first.blocks) == (n * SIZE, lent)
    driver.engine.submit(Cancel("images"))
    memory = driver.engine.kv.data[list(lent)].clone()
    driver.engine.submit(ItemLanded("longer", 3, images.rows[0]))
    driver.until(lambda: "longer" in driver.prefilled)
    assert driver.progress["longer"][-1].blocks[:n] == lent
    assert torch.equal(driver.engine.kv.data[list(lent)], memory)
    driver.engine.submit(Cancel("longer"))
    assert driver.is_empty()


def test_rows_that_are_not_proven_are_found_by_nobody(driver: Driver, images: Case) -> None:
    """Nor is what was computed from rows that turned out wrong."""
    asked: list[Used] = []

    def questions() -> list[Used]:
        return [u for output in driver.outputs for u in output.used if u not in asked]

    driver.engine.submit(images.request(name="one"))
    for item, rows in enumerate(images.rows):
        wrong = torch.full_like(rows, 3.0) if item == 0 else rows
        driver.engine.submit(ItemLanded("one", item, wrong, trust=Trust.BORROWED))
    places = [i for i, t in enumerate(images.token_ids) if t == driver.engine.model.image_token_id]
    sequences = driver.engine._requests.sequences
    driver.until(lambda: bool(questions()) and sequences["one"].computed > places[-1])
    driver.add(images, name="two")
    driver.finish("two")
    # A first step may have begun when no image had landed: it has read no rows.
    assert begin(driver, "two") <= places[0]
    assert driver.answer("two") == images.answer
    asked += questions()
    driver.engine.submit(Lapsed("one", 0))
    driver.engine.submit(ItemLanded("one", 0, images.rows[0], trust=Trust.BORROWED))
    for used in asked:
        driver.engine.submit(Proven("one", used.serial))  # of before
    while not driver.ended("one"):
        for used in questions():
            asked.append(used)
            driver.engine.submit(Proven("one", used.serial))
        driver._take(driver._outputs.get(timeout=20))
    assert driver.answer("one") == images.answer
    driver.add(images, name="three")
    driver.finish("three")
    assert driver.answer("three") == images.answer
    assert begin(driver, "three") == (len(images.token_ids) - 1) // SIZE * SIZE
    assert driver.is_empty()


def test_rows_that_land_for_nothing_are_given_back(driver: Driver, images: Case) -> None:
    driver.add(images, name="one")
    driver.finish("one")
    driver.engine.submit(images.request(name="two"))
    for item, rows in enumerate(images.rows):
        driver.engine.submit(
            ItemLanded("two", item, rows, trust=Trust.BORROWED if item == 1 else Trust.PROVEN)
        )
    driver.finish("two")
    driver.until(lambda: len([c for c in driver.consumed if c[0] == "two"]) == 3)
    assert driver.answer("two") == images.answer
    assert driver.is_empty()


@pytest.mark.parametrize("seed", range(3))
def test_under_preemption_and_cancels(qwen: Family, images: Case, seed: int) -> None:
    """Requests with beginnings in common that push each other out and are found again."""
    draw = Random(seed)
    text = qwen.case("text", 0)
    long = Sampling(max_tokens=30, temperature=0.8, seed=3, logprobs=3)
    expected = {
        case.name: uncached(qwen, case.request(long, name="calm"), case.rows)
        for case in (text, images)
    }
    n_blocks = -(-(len(images.token_ids) + 30) // SIZE) + 10
    with Driver(qwen.language, n_blocks=n_blocks, block_size=SIZE, chunk_tokens=24) as driver:
        cases = {str(i): draw.choice([text, images]) for i in range(14)}
        cancelled = draw.sample(sorted(cases), 4)
        for name, case in cases.items():
            driver.add(case, long, name=name)
        for name in cancelled:
            outputs = len(driver.outputs) + draw.randrange(12)
            driver.until(lambda: len(driver.outputs) >= outputs)  # noqa: B023
            driver.engine.submit(Cancel(name))
        survivors = [name for name in cases if name not in cancelled]
        driver.finish(*survivors)
        assert preemptions(driver) > 0
        assert any(begin(driver, name) > 0 for name in survivors)
        for name in survivors:
            assert_same(driver.events(name), expected[cases[name].name])
        assert driver.is_empty()
