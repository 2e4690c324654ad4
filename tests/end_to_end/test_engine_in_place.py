"""Rows that may not be right, in another process's memory or copied from there: nothing is told
before they are proven, and rows that were wrong leave no trace in the answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from random import Random

import pytest
import torch

from tests.end_to_end.engine_driver import Case, Driver, Family
from triptych.engine.messages import Cancel, ItemLanded, Lapsed, Proven, Used, Vouched
from triptych.engine.sequence import Trust

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("qwen3_vl"), "qwen3_vl")


@pytest.fixture(scope="module")
def images(family: Family) -> Case:
    return family.case("images", 3)


@pytest.fixture
def driver(family: Family) -> Iterator[Driver]:
    with Driver(family.language, chunk_tokens=8) as running:
        yield running


def lend(driver: Driver, images: Case, item: int, *, wrong: bool = False) -> None:
    rows = images.rows[item]
    rows = torch.full_like(rows, 3.0) if wrong else rows
    driver.engine.submit(ItemLanded("images", item, rows, trust=Trust.BORROWED))


def asked(driver: Driver) -> list[Used]:
    return [used for output in driver.outputs for used in output.used]


def prove(driver: Driver, used: Used) -> None:
    driver.engine.submit(Proven(used.request_id, used.serial))


def steps_over(driver: Driver, images: Case) -> int:
    """Wait until every chunk with rows was computed; the number of questions."""
    last_row = max(
        i for i, t in enumerate(images.token_ids) if t == driver.engine.model.image_token_id
    )
    sequences = driver.engine._requests.sequences
    driver.until(lambda: bool(asked(driver)) and sequences["images"].computed > last_row)
    return len(asked(driver))


@pytest.mark.parametrize("keep_kv", [False, True])
def test_nothing_is_told_before_the_rows_are_proven(
    driver: Driver, images: Case, keep_kv: bool
) -> None:
    driver.engine.submit(images.request(keep_kv=keep_kv))
    for item in range(3):
        lend(driver, images, item)
    before = images.token_ids.index(driver.engine.model.image_token_id)
    assert steps_over(driver, images) > 3
    assert driver.tokens == [] and driver.consumed == [] and driver.prefilled == {}
    published = [each.computed for each in driver.progress["images"]]
    assert all(computed <= before for computed in published)
    for used in asked(driver):
        prove(driver, used)
    if keep_kv:
        driver.until(lambda: "images" in driver.prefilled)
        assert driver.answer("images") == images.answer[:1]
        assert driver.progress["images"][-1].computed == len(images.token_ids)
    else:
        driver.finish("images")
        assert driver.answer("images") == images.answer
    assert driver.consumed == [("images", item) for item in range(3)]


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_rows_that_were_wrong_are_computed_again(driver: Driver, images: Case, wrong: int) -> None:
    driver.engine.submit(images.request())
    for item in range(3):
        lend(driver, images, item, wrong=item == wrong)
    steps_over(driver, images)
    stale = [used for used in asked(driver) if wrong in used.items]
    for used in asked(driver):
        if wrong not in used.items:
            prove(driver, used)
    driver.engine.submit(Lapsed("images", wrong))
    for used in stale:
        prove(driver, used)  # an answer to a question of before: it proves nothing
    count = len(asked(driver))
    lend(driver, images, wrong)
    driver.until(lambda: len(asked(driver)) > count)
    assert driver.tokens == []
    answered: set[int] = set()
    while not driver.ended("images"):
        for used in asked(driver)[count:]:
            if used.serial not in answered:
                answered.add(used.serial)
                prove(driver, used)
        driver._take(driver._outputs.get(timeout=10))
    assert driver.answer("images") == images.answer
    assert sorted(driver.consumed) == [("images", item) for item in range(3)]


@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_answers_and_lapses(driver: Driver, images: Case, seed: int) -> None:
    """Every image is lent wrong a few times; each question is answered late, in any order."""
    draw = Random(seed)
    wrong_left = [draw.randrange(3) for _ in range(3)]
    lent: dict[int, bool] = {}
    handled: set[int] = set()
    driver.engine.submit(images.request(keep_kv=bool(seed % 2)))

    def lend_next(item: int) -> None:
        wrong = wrong_left[item] > 0
        wrong_left[item] -= wrong
        lent[item] = wrong
        lend(driver, images, item, wrong=wrong)

    for item in draw.sample(range(3), 3):
        lend_next(item)
    done = (lambda: "images" in driver.prefilled) if seed % 2 else (lambda: driver.ended("images"))
    while not done():
        driver._take(driver._outputs.get(timeout=20))
        questions = [used for used in asked(driver) if used.serial not in handled]
        draw.shuffle(questions)
        for used in questions:
            handled.add(used.serial)
            lapsed = [item for item in used.items if lent[item]]
            for item in lapsed:
                driver.engine.submit(Lapsed("images", item))
                lend_next(item)
            if not lapsed:
                prove(driver, used)
    expected = images.answer[:1] if seed % 2 else images.answer
    assert driver.answer("images") == expected
    assert sorted(driver.consumed) == [("images", item) for item in range(3)]


def test_a_copy_is_asked_about_until_it_is_vouched_for(driver: Driver, images: Case) -> None:
    driver.engine.submit(images.request())
    for item in (2, 1, 0):  # in the order of the prompt: nothing is read before the first is there
        driver.engine.submit(ItemLanded("images", item, images.rows[item], Trust.COMING))
        if item > 0:
            driver.engine.submit(Vouched("images", item))
    driver.until(lambda: bool(asked(driver)))
    sequence = driver.engine._requests.sequences["images"]
    end = time.monotonic() + 20
    while sequence.computed < sequence.n_prompt:  # the other steps have nothing to say
        assert time.monotonic() < end
        time.sleep(0.005)
    assert driver.tokens == [] and driver.consumed == []
    proven = 0
    while not driver.ended("images"):
        for used in asked(driver)[proven:]:
            proven += 1
            prove(driver, used)
        driver._take(driver._outputs.get(timeout=20))
    assert {item for used in asked(driver) for item in used.items} == {0}
    assert driver.answer("images") == images.answer
    assert driver.consumed == [("images", item) for item in range(3)]


def test_what_is_withheld_ends_with_its_request(driver: Driver, images: Case) -> None:
    driver.engine.submit(images.request())
    for item in range(3):
        lend(driver, images, item)
    steps_over(driver, images)
    driver.engine.submit(Cancel("images"))
    for used in asked(driver):
        prove(driver, used)
    driver.engine.submit(Lapsed("images", 0))
    assert driver.is_empty()
    assert sorted(driver.consumed) == [("images", item) for item in range(3)]
    assert driver.answer("images") == [] and not driver.engine._requests.withheld._entries
