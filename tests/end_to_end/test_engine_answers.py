"""What a running engine says: ends of answers, sampling, logprobs, spans; its start and end."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.end_to_end.engine_driver import CLOSE_S, PATIENCE_S, Case, Driver, Family
from triptych.config import EngineConfig
from triptych.engine.loop import Engine
from triptych.engine.messages import (
    AddRequest,
    Cancel,
    Message,
    Reserve,
    StartDecode,
    StepOutput,
)
from triptych.engine.selftest import selftest
from triptych.errors import (
    ConfigError,
    PromptTooLong,
    UnsupportedModel,
    WorkerLost,
)
from triptych.request import Sampling

torch.set_num_threads(1)
MIXED = Sampling(max_tokens=12, temperature=0.8, top_p=0.9, top_k=40, seed=11)


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


def test_stop_ids_and_max_tokens_end_the_answer(driver: Driver, text: Case) -> None:
    third = text.answer[2]
    n = text.answer.index(third) + 1
    stops = Sampling(max_tokens=12, temperature=0, stop_ids=(third,))
    driver.add(text, stops, name="stop")
    driver.add(text, Sampling(max_tokens=2, temperature=0), name="length")
    driver.add(text, Sampling(max_tokens=1, temperature=0), name="one")
    driver.add(text, Sampling(max_tokens=1, temperature=0), name="kept", keep_kv=True)
    driver.finish("stop", "length", "one", "kept")
    assert driver.answer("stop") == text.answer[:n]
    assert [event.finish for event in driver.events("stop")] == [""] * (n - 1) + ["stop"]
    assert [(e.index, e.finish) for e in driver.events("length")] == [(0, ""), (1, "length")]
    assert [event.finish for event in driver.events("one")] == ["length"]
    assert driver.prefilled["kept"].first == driver.events("kept")[0]
    driver.engine.submit(Cancel("kept"))
    assert driver.is_empty()


def test_sampled_answers_do_not_depend_on_the_batch(
    family: Family, text: Case, images: Case
) -> None:
    def answers(chunk_tokens: int, *cases: tuple[Case, str, int]) -> list[list[int]]:
        with Driver(family.language, chunk_tokens=chunk_tokens) as driver:
            for case, name, seed in cases:
                sampling = Sampling(max_tokens=12, temperature=0.8, top_p=0.9, seed=seed)
                driver.add(case, sampling, name=name)
            driver.finish(*(name for _, name, _ in cases))
            return [driver.answer(name) for _, name, _ in cases]

    [alone] = answers(512, (text, "a", 1))
    together = answers(7, (images, "b", 1), (text, "a", 1), (text, "c", 1), (text, "d", 2))
    assert together[1] == alone and together[2] == alone
    assert together[3] != alone


def test_sampling_goes_on_after_a_hand_over(family: Family, text: Case) -> None:
    """The draw of a token is the same whichever engine makes it."""
    n_prompt = len(text.token_ids)
    with Driver(family.language) as whole, Driver(family.language) as decode:
        whole.add(text, MIXED)
        whole.finish("text")
        whole.add(text, MIXED, name="kept", keep_kv=True)
        whole.until(lambda: "kept" in whole.prefilled)
        decode.engine.submit(Reserve("kept", n_prompt + 12))
        decode.until(lambda: "kept" in decode.reserved)
        blocks = whole.progress["kept"][-1].blocks
        for there, here in zip(blocks, decode.reserved["kept"], strict=False):
            decode.engine.kv.data[here] = whole.engine.kv.data[there]
        done = whole.prefilled["kept"]
        decode.engine.submit(StartDecode("kept", n_prompt, done.first, done.next_position, MIXED))
        decode.finish("kept")
    assert whole.answer("kept") + decode.answer("kept") == whole.answer("text")


def test_logprobs_come_with_the_tokens(driver: Driver, text: Case) -> None:
    driver.add(text, Sampling(max_tokens=12, temperature=0, logprobs=2))
    driver.finish("text")
    assert text.logits is not None
    expected = text.logits.log_softmax(-1)
    for row, event in zip(expected, driver.events("text"), strict=True):
        assert event.logprob == pytest.approx(float(row.max()), abs=1e-4)
        assert [top.token for top in event.top] == row.topk(2).indices.tolist()
        assert event.top[0].logprob == event.logprob


# ------------------------------------------------------------------ the loop


def test_tokens_of_a_step_are_emitted_together(driver: Driver, text: Case) -> None:
    long = Sampling(max_tokens=60, temperature=0)
    driver.add(text, long, name="a")
    driver.add(text, long, name="b")
    driver.finish("a", "b")
    together = [len(output.tokens) for output in driver.outputs]
    assert together.count(2) >= 58
    for output in driver.outputs:
        assert len({event.request_id for event in output.tokens}) == len(output.tokens)


def test_what_images_are_wanted_is_told_before_the_step_is_computed(
    family: Family, text: Case, images: Case
) -> None:
    driver = Driver(family.language)
    driver.engine.submit(text.request())
    driver.engine.submit(images.request())
    with driver:
        driver.until(lambda: bool(driver.outputs))
        [first] = driver.outputs
        assert first.wanted == tuple(("images", item) for item in range(len(images.rows)))
        assert not first.tokens
        driver.finish("text")


def test_spans_tell_where_the_time_went(driver: Driver, images: Case) -> None:
    driver.add(images)
    driver.finish("images")
    spans = driver.spans["images"]
    n = len(images.token_ids)
    ends = [*range(16, n, 16), n]
    chunks = [f"tokens {a}..{b}" for a, b in zip([0, *ends], ends, strict=False)]
    assert driver.notes("images", "prefill") == chunks
    assert [s.name for s in spans if s.name != "prefill"] == ["queue", "first_token", "decode"]
    assert driver.notes("images", "decode") == ["11"]
    assert all(span.start <= span.end for span in spans)
    starts = [span.start for span in spans]
    assert starts == sorted(starts)


def test_first_progress_and_prefilled_order(driver: Driver, images: Case) -> None:
    driver.add(images, keep_kv=True)
    driver.until(lambda: "images" in driver.prefilled)
    last = driver.outputs[-1]
    assert last.progress[0].computed == len(images.token_ids)
    assert last.prefilled[0].first == last.tokens[0]
    sizes = [len(progress.blocks) for progress in driver.progress["images"]]
    assert sizes == sorted(sizes) and len(sizes) == -(-len(images.token_ids) // 16)


def test_closing_fails_what_is_left(family: Family, text: Case) -> None:
    driver = Driver(family.language)
    with driver:
        driver.add(text, Sampling(max_tokens=900))
        driver.engine.submit(Reserve("held", 30))
        driver.until(lambda: "held" in driver.reserved)
    driver.until(lambda: {"text", "held"} <= set(driver.failed))
    assert all(isinstance(failure, WorkerLost) for failure in driver.failed.values())
    refused: list[Message] = [text.request(), Reserve("late", 1)]
    for message in refused:
        with pytest.raises(WorkerLost):
            driver.engine.submit(message)
    driver.engine.submit(Cancel("text"))
    driver.engine.close(CLOSE_S)


def test_the_cache_lives_in_the_memory_given(family: Family, text: Case) -> None:
    outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
    memory = torch.zeros(100_000, dtype=torch.uint8)
    engine = Engine(family.language, memory, EngineConfig(), outputs.put)
    assert engine.kv.n_blocks == 100_000 // engine.kv.block_nbytes
    assert engine.max_model_len == 16 * engine.kv.n_blocks
    engine.start()
    engine.submit(text.request(Sampling(max_tokens=1)))
    engine.submit(Reserve("last", 16))
    while not (reserved := outputs.get(timeout=PATIENCE_S).reserved):
        pass
    engine.close(CLOSE_S)
    [block] = reserved[0].blocks
    assert engine.kv.offset(block) == block * engine.kv.block_nbytes
    assert memory.count_nonzero() > 0
    with pytest.raises(ConfigError, match="no room for one block"):
        Engine(family.language, memory[:100], EngineConfig(), outputs.put)


def test_max_model_len_is_what_was_asked(family: Family) -> None:
    with Driver(family.language, max_model_len=20) as driver:
        assert driver.engine.max_model_len == 20
        driver.engine.submit(AddRequest("a", (1,) * 10, (), Sampling(max_tokens=11)))
        driver.engine.submit(AddRequest("b", (1,) * 10, (), Sampling(max_tokens=10)))
        driver.finish("a", "b")
    assert isinstance(driver.failed["a"], PromptTooLong)
    assert len(driver.answer("b")) == 10


@pytest.mark.parametrize("fault", ["positions", "planes", "values"])
def test_selftest_refuses_a_model_that_it_gets_wrong(family: Family, fault: str) -> None:
    model = family.language
    forward = model.forward

    def wrong(embeds: Any, positions: Any, context: Any, **planes: Any) -> torch.Tensor:
        if fault == "positions":
            positions = positions + (torch.arange(positions.shape[1]) == 3)
        elif fault == "planes":
            planes = {}
        hidden = forward(embeds, positions, context, **planes)
        return hidden * torch.nan if fault == "values" else hidden

    with (
        patch.object(model, "forward", wrong),
        pytest.raises(UnsupportedModel, match="logits differ by"),
    ):
        selftest(model, EngineConfig())
