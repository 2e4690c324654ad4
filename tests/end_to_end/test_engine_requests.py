"""Requests in a running engine: images that land late, failures, cancels, reservations."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from tests.end_to_end.engine_driver import GREEDY, Case, Driver, Family
from triptych.engine.messages import (
    AddRequest,
    Cancel,
    ItemLanded,
    Reserve,
    StartDecode,
)
from triptych.engine.sequence import ItemSpan
from triptych.errors import (
    BadRequest,
    PromptTooLong,
    TransferFailed,
    TriptychError,
)
from triptych.request import Sampling, TokenEvent

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("qwen3_vl"), "qwen3_vl")


@pytest.fixture(scope="module")
def text(family: Family) -> Case:
    return family.case("text", 0)


@pytest.fixture(scope="module")
def images(family: Family) -> Case:
    return family.case("images", 3)


@pytest.fixture
def driver(family: Family) -> Iterator[Driver]:
    with Driver(family.language, chunk_tokens=16) as running:
        yield running


# ------------------------------------------------------------------ landing


def test_prefill_runs_up_to_the_first_row_that_has_not_landed(driver: Driver, images: Case) -> None:
    first_row = images.token_ids.index(driver.engine.model.image_token_id)
    driver.engine.submit(images.request())
    driver.until(lambda: driver.notes("images", "prefill") == [f"tokens 0..{first_row}"])
    assert driver.consumed == []
    for item in (2, 1):
        driver.engine.submit(ItemLanded("images", item, images.rows[item]))
    driver.engine.submit(ItemLanded("nobody", 5, images.rows[0]))
    driver.until(lambda: driver.consumed == [("nobody", 5)])
    assert len(driver.notes("images", "prefill")) == 1
    driver.engine.submit(ItemLanded("images", 0, images.rows[0]))
    driver.finish("images")
    assert driver.answer("images") == images.answer
    assert driver.consumed[1:] == [("images", 0), ("images", 1), ("images", 2)]


def test_images_landing_one_by_one_give_the_same_answer(driver: Driver, images: Case) -> None:
    driver.engine.submit(images.request())
    for item, rows in enumerate(images.rows):
        driver.engine.submit(ItemLanded("images", item, rows))
        driver.until(lambda item=item: ("images", item) in driver.consumed)  # type: ignore[misc]
    driver.finish("images")
    assert driver.answer("images") == images.answer


def test_rows_are_read_in_place_and_never_after_consumed(driver: Driver, images: Case) -> None:
    landing = [rows.clone() for rows in images.rows]
    driver.engine.submit(images.request())
    for item, rows in enumerate(landing):
        driver.engine.submit(ItemLanded("images", item, rows))
        driver.until(lambda item=item: ("images", item) in driver.consumed)  # type: ignore[misc]
        rows.fill_(torch.nan)
    driver.finish("images")
    assert driver.answer("images") == images.answer


# ------------------------------------------------------------------ failures


def bad_requests(images: Case) -> dict[str, tuple[AddRequest, type[TriptychError], str]]:
    ids, spans = images.token_ids, images.spans
    return {
        "rows": (AddRequest("bad", ids, spans[:2], GREEDY), BadRequest, "tokens for rows"),
        "grids": (
            AddRequest("bad", ids, tuple(ItemSpan(s.rows, (1, 2, 2)) for s in spans), GREEDY),
            BadRequest,
            "image tokens",
        ),
        "no grids": (
            AddRequest("bad", ids, tuple(ItemSpan(s.rows, None) for s in spans), GREEDY),
            BadRequest,
            "image tokens",
        ),
        "empty": (AddRequest("bad", (), (), GREEDY), BadRequest, "needs a prompt"),
        "no answer": (
            AddRequest("bad", (1,), (), Sampling(max_tokens=0)),
            BadRequest,
            "at least one token",
        ),
        "vocabulary": (AddRequest("bad", (1, 10**6), (), GREEDY), BadRequest, "token 1000000"),
        "model": (AddRequest("bad", (1,) * 4090, (), GREEDY), PromptTooLong, "4096"),
        "cache": (AddRequest("bad", (1,) * 1100, (), GREEDY), PromptTooLong, "KV cache of 1024"),
    }


@pytest.mark.parametrize(
    "kind", ["rows", "grids", "no grids", "empty", "no answer", "vocabulary", "model", "cache"]
)
def test_a_bad_request_fails_by_name_and_alone(
    driver: Driver, text: Case, images: Case, kind: str
) -> None:
    request, error, words = bad_requests(images)[kind]
    driver.add(text)
    driver.engine.submit(request)
    driver.finish("text", "bad")
    assert driver.answer("text") == text.answer
    assert list(driver.failed) == ["bad"]
    assert isinstance(driver.failed["bad"], error)
    assert words in driver.failed["bad"].message
    assert driver.is_empty()


def test_rows_of_another_shape_fail_their_request(driver: Driver, text: Case, images: Case) -> None:
    driver.add(text)
    driver.engine.submit(images.request())
    driver.engine.submit(ItemLanded("images", 0, images.rows[0]))
    driver.engine.submit(ItemLanded("images", 1, images.rows[1][:1]))
    driver.finish("text", "images")
    failure = driver.failed["images"]
    assert isinstance(failure, TransferFailed) and failure.item == 1
    assert "(1, 9, 64)" in failure.message and "(4, 9, 64)" in failure.message
    assert driver.answer("text") == text.answer
    assert sorted(driver.consumed) == [("images", 0), ("images", 1)]
    assert driver.is_empty()


def test_an_exception_in_a_step_fails_that_step_and_the_engine_goes_on(
    family: Family, driver: Driver, text: Case, images: Case
) -> None:
    with patch.object(family.language, "embed", side_effect=RuntimeError("out of luck")):
        driver.add(text)
        driver.finish("text")
    failure = driver.failed["text"]
    assert failure.message == "RuntimeError: out of luck" and type(failure) is TriptychError
    driver.add(images)
    driver.finish("images")
    assert driver.answer("images") == images.answer
    assert driver.is_empty()


def test_nan_of_one_request_does_not_reach_another(family: Family, text: Case) -> None:
    """Blocks that held NaN are used again, and one batch decodes prompts of unequal lengths."""
    poison = AddRequest("poison", (5,) * 200, (), Sampling(max_tokens=20, temperature=0))
    embed = family.language.embed

    def poisoned(ids: torch.Tensor) -> torch.Tensor:
        return torch.where((ids == 5)[:, None], torch.nan, embed(ids))

    with (
        Driver(family.language, chunk_tokens=300) as driver,
        patch.object(family.language, "embed", poisoned),
    ):
        memory = driver.engine.kv.data
        memory.fill_(torch.nan)
        driver.engine.submit(poison)
        names = [driver.add(text, name=str(i)) for i in range(3)]
        driver.finish("poison", *names)
        names.append(driver.add(text, name="later"))
        driver.finish("later")
        assert all(driver.answer(name) == text.answer for name in names)


# ------------------------------------------------------------------ cancel


def test_cancel_while_decoding_is_idempotent(driver: Driver, text: Case) -> None:
    driver.engine.submit(AddRequest("long", text.token_ids, (), Sampling(max_tokens=900)))
    driver.until(lambda: len(driver.answer("long")) > 3)
    for _ in range(3):
        driver.engine.submit(Cancel("long"))
    assert driver.is_empty()
    assert not driver.ended("long")


def test_cancel_while_waiting_for_an_image_gives_its_memory_back(
    driver: Driver, images: Case
) -> None:
    driver.engine.submit(images.request())
    driver.engine.submit(ItemLanded("images", 2, images.rows[2]))
    driver.engine.submit(Cancel("images"))
    driver.engine.submit(ItemLanded("images", 0, images.rows[0]))
    driver.until(lambda: len(driver.consumed) == 2)
    assert driver.consumed == [("images", 2), ("images", 0)]
    assert driver.is_empty()
    assert driver.failed == {}


def test_cancel_in_every_other_state(driver: Driver, text: Case) -> None:
    driver.add(text, keep_kv=True)
    driver.engine.submit(Reserve("granted", 16))
    driver.until(lambda: "text" in driver.prefilled and "granted" in driver.reserved)
    driver.engine.submit(Reserve("all", 16 * driver.free_blocks))
    driver.until(lambda: "all" in driver.reserved)
    driver.engine.submit(Reserve("waiting", 16))
    driver.engine.submit(AddRequest("queued", (1, 2), (), GREEDY))
    for name in ("queued", "waiting", "all", "granted", "text", "unknown"):
        driver.engine.submit(Cancel(name))
    assert driver.is_empty()
    assert driver.failed == {}
    assert set(driver.reserved) == {"granted", "all"}


def test_cancels_at_random_moments_harm_nobody(family: Family, text: Case, images: Case) -> None:
    random = Random(3)
    with Driver(family.language, chunk_tokens=24, block_size=4, max_sequences=6) as driver:
        cases = {str(i): random.choice([text, images]) for i in range(40)}
        cancelled = set(random.sample(sorted(cases), 20))
        landed = 0
        for name, case in cases.items():
            driver.add(case, name=name, keep_kv=name in cancelled and random.random() < 0.3)
            landed += len(case.rows)
        for name in random.sample(sorted(cancelled), 20):
            outputs = len(driver.outputs) + random.randrange(3)
            driver.until(lambda: len(driver.outputs) >= outputs)  # noqa: B023
            driver.engine.submit(Cancel(name))
        survivors = [name for name in cases if name not in cancelled]
        driver.finish(*survivors)
        assert driver.is_empty()
    assert driver.failed == {}
    assert all(driver.answer(name) == cases[name].answer for name in survivors)
    assert len(driver.consumed) == len(set(driver.consumed)) == landed


def test_messages_for_unknown_requests_are_ignored(driver: Driver) -> None:
    first = TokenEvent("nobody", 0, 1)
    for message in (
        Cancel("nobody"),
        StartDecode("nobody", 3, first, 3, GREEDY),
    ):
        driver.engine.submit(message)
    assert driver.is_empty()
    assert driver.failed == {}


def used(driver: Driver) -> dict[str, int]:
    return {state: n for state, n in driver.engine.usage.items() if n}


def test_any_thread_sees_what_blocks_are_doing(driver: Driver, text: Case) -> None:
    whole, size = driver.engine.kv.n_blocks, driver.engine.kv.block_size
    driver.add(text, keep_kv=True)
    driver.until(lambda: "text" in driver.prefilled)
    kept = -(-len(text.token_ids) // size)
    driver.engine.submit(Reserve("later", 3 * size))
    driver.until(lambda: "later" in driver.reserved)
    free = whole - kept - 3
    assert used(driver) == {"free": free, "reserved": 3, "leased": kept}
    driver.engine.submit(Cancel("text"))
    driver.engine.submit(Cancel("later"))
    assert driver.is_empty()
    assert used(driver) == {"free": whole}


def test_a_request_sent_twice_is_answered_once(driver: Driver, text: Case) -> None:
    driver.engine.submit(text.request())
    driver.engine.submit(text.request())
    driver.engine.submit(Reserve("text", 5))
    driver.finish("text")
    assert driver.answer("text") == text.answer
    assert driver.is_empty()


# ------------------------------------------------------------------ reservations


def test_reservations_are_granted_in_order_as_blocks_come_free(driver: Driver) -> None:
    whole = 16 * driver.engine.kv.n_blocks
    driver.engine.submit(Reserve("a", whole))
    driver.engine.submit(Reserve("b", whole))
    driver.engine.submit(Reserve("c", 1))
    driver.until(lambda: "a" in driver.reserved)
    assert len(driver.reserved["a"]) == driver.engine.kv.n_blocks
    driver.engine.submit(Cancel("a"))
    driver.until(lambda: "b" in driver.reserved)
    driver.engine.submit(Cancel("b"))
    driver.until(lambda: "c" in driver.reserved)
    assert list(driver.reserved) == ["a", "b", "c"]
    assert [span.name for span in driver.spans["b"]] == ["queue"]


def test_a_reservation_too_large_or_too_small_is_refused(driver: Driver, text: Case) -> None:
    driver.engine.submit(Reserve("large", 16 * driver.engine.kv.n_blocks + 1))
    driver.engine.submit(Reserve("model", 5000))
    driver.engine.submit(Reserve("small", 10))
    driver.until(lambda: "small" in driver.reserved and len(driver.failed) == 2)
    driver.engine.submit(StartDecode("small", 9, TokenEvent("small", 0, 1), 9, GREEDY))
    driver.finish("small")
    assert all(isinstance(failure, PromptTooLong) for failure in driver.failed.values())
    assert driver.failed["small"].message == "21 tokens are more than the 10 reserved"
    assert driver.is_empty()


def test_an_answer_that_ended_with_its_first_token_just_frees(driver: Driver) -> None:
    driver.engine.submit(Reserve("a", 20))
    driver.until(lambda: "a" in driver.reserved)
    first = TokenEvent("a", 0, 1, finish="stop")
    driver.engine.submit(StartDecode("a", 9, first, 9, GREEDY))
    assert driver.is_empty()
    assert driver.events("a") == []


def test_what_is_captured_goes_with_the_engine(family: Family) -> None:
    """A rank's communicator waits for the end of the graphs in which its operations are."""
    with Driver(family.language) as driver:
        released: list[bool] = []
        captured = SimpleNamespace(release=lambda: released.append(True))
        driver.engine._runner.graphs = captured  # type: ignore[assignment]
    assert released == [True] and driver.engine._runner.graphs is None
