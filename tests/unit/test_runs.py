"""Rows that a model computes as a whole: no chunk cuts them, each sees all of them, nobody waits
for them forever."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.unit.conftest import TinyModel
from tests.unit.test_scheduler import prompt, run, shown
from triptych.config import EngineConfig
from triptych.engine import backends
from triptych.engine.attention import Part, SdpaAttention, paged_attention
from triptych.engine.block_manager import BlockManager
from triptych.engine.intake import Intake
from triptych.engine.kv_cache import KVCache, KVShape
from triptych.engine.messages import AddRequest
from triptych.engine.scheduler import Scheduler
from triptych.engine.sequence import ItemSpan, Run, Sequence, runs_of
from triptych.errors import BadRequest, ConfigError
from triptych.request import Sampling

HEADS, DIM, SIZE = 2, 8, 4


def with_runs(name: str, n: int, *runs: Run, answer: int = 2) -> Sequence:
    sequence = prompt(name, n, answer)
    sequence.runs = runs
    return sequence


def test_runs_are_rows_next_to_each_other() -> None:
    assert runs_of([]) == ()
    assert runs_of([3, 4, 5, 9, 11, 12]) == ((3, 6), (9, 10), (11, 13))


# ------------------------------------------------------------------ chunks


def test_a_chunk_ends_before_a_run_that_does_not_fit() -> None:
    owner = Scheduler(BlockManager(100, 4), 8, 4, longest_run=6)
    owner.add(with_runs("a", 16, (5, 11), (11, 12), (13, 16)))
    seen = []
    for _ in range(3):
        step = owner.schedule()
        seen += shown(step)
        run(step, owner)
    assert seen == [("a", 0, 5), ("a", 5, 13), ("a", 13, 16)]


def test_what_a_run_leaves_is_for_others() -> None:
    owner = Scheduler(BlockManager(100, 4), 8, 4, longest_run=6)
    owner.add(with_runs("a", 9, (3, 9)))
    owner.add(with_runs("b", 7))
    step = owner.schedule()
    assert shown(step) == [("a", 0, 3), ("b", 0, 5)]
    run(step, owner)
    step = owner.schedule()
    assert sorted(shown(step)) == [("a", 3, 9), ("b", 5, 7)]


def test_decodes_leave_room_for_the_longest_run() -> None:
    owner = Scheduler(BlockManager(100, 4), 8, 100, longest_run=6)
    assert owner.places == 3
    for name in "abc":
        owner.add(with_runs(name, 7, (1, 7), answer=50))
    done = set()
    for _ in range(6):
        step = owner.schedule()
        done |= {work.sequence.request_id for work in step.work if work.samples}
        run(step, owner)
    assert done == set("abc")


@given(st.data())
def test_no_run_is_ever_cut_and_everything_ends(data: st.DataObject) -> None:
    longest = data.draw(st.integers(1, 6))
    owner = Scheduler(
        BlockManager(16, 4), data.draw(st.integers(longest, 9)), 5, longest_run=longest
    )
    lengths = st.lists(st.tuples(st.integers(0, 4), st.integers(1, longest)), max_size=4)
    for i in range(data.draw(st.integers(1, 6))):
        n, runs = 1, []
        for text, rows in data.draw(lengths):
            n += text
            runs.append((n, n + rows))
            n += rows
        owner.add(with_runs(str(i), n + data.draw(st.integers(0, 3)), *runs))
    while owner.queue or owner.running:
        step = owner.schedule()
        assert step.work and sum(w.stop - w.start for w in step.work) <= owner.chunk_tokens
        for work in step.work:
            for first, last in work.sequence.runs:
                assert not first < work.start < last and not first < work.stop < last
        run(step, owner)


# ------------------------------------------------------------------ attention


class Layer(nn.Module):
    layer_idx = 0


def dense(q: Tensor, k: Tensor, v: Tensor, start: int, runs: list[Run], window: int) -> Tensor:
    """(tokens, heads, dim) for the queries from ``start`` on, one by one."""
    out = torch.empty_like(q)
    for i in range(len(q)):
        query = start + i
        end = max([query + 1, *(last for first, last in runs if first <= query < last)])
        seen = slice(max(0, query + 1 - window), end)
        for head in range(HEADS):
            scores = k[seen, head] @ q[i, head] / math.sqrt(DIM)
            out[i, head] = scores.softmax(0) @ v[seen, head]
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 6])
@pytest.mark.parametrize("start", [0, 2, 5, 7])
def test_rows_of_a_run_see_each_other(start: int, window: int | None) -> None:
    """From 5 on: what is before was computed with the rest of its run, and is in the cache."""
    torch.manual_seed(0)
    runs, stop = [(3, 8), (10, 12)], 13
    shape = KVShape(1, HEADS, DIM, torch.float32)
    kv = KVCache(torch.zeros(8 * shape.block_nbytes(SIZE), dtype=torch.uint8), shape, SIZE)
    attention = SdpaAttention(kv, 1, 8)
    attention.place(0, [6, 1, 4, 3], stop)
    q, k, v = torch.randn(3, stop, HEADS, DIM)

    def attend(first: int, last: int, seen: list[Run]) -> Tensor:
        part = Part(0, first, last, tuple(run for run in seen if run[1] > first))
        query, key, value = (x[first:last].transpose(0, 1)[None] for x in (q, k, v))
        context = attention.plan([part], 0)
        out, _ = paged_attention(
            Layer(), query, key, value, None, context=context, sliding_window=window
        )
        return out[0]

    if start:
        attend(0, start, [])
    found = attend(start, stop, runs)
    expected = dense(q[start:], k, v, start, runs, window or stop)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


# ------------------------------------------------------------------ refusals


def test_a_step_must_have_room_for_a_run(tiny_models: Callable[[str], TinyModel]) -> None:
    model = tiny_models("gemma3").language
    assert model.longest_run == 4
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="--chunk-tokens 3: .* the 4 rows of an image at once"):
        backends.Compute(model, memory, EngineConfig(chunk_tokens=3), 100)
    backends.Compute(model, memory, EngineConfig(chunk_tokens=4), 100)


def test_rows_of_two_images_need_something_between_them(
    tiny_models: Callable[[str], TinyModel],
) -> None:
    model = tiny_models("gemma3").language
    spans, sampling = (ItemSpan(4, None), ItemSpan(4, None)), Sampling(max_tokens=1)
    row = [model.image_token_id] * 4
    apart = AddRequest("a", (1, *row, 2, *row), spans, sampling)
    sequence, _ = Intake(model, 100, 0).prompt(apart)
    assert sequence.runs == ((1, 5), (6, 10))
    together = AddRequest("b", (1, *row, *row), spans, sampling)
    with pytest.raises(BadRequest, match="more than 4 rows"):
        Intake(model, 100, 0).prompt(together)


def test_other_models_have_no_runs(tiny_models: Callable[[str], TinyModel]) -> None:
    model = tiny_models("internvl").language
    row = [model.image_token_id] * 4
    request = AddRequest("a", (1, *row, 2), (ItemSpan(4, None),), Sampling(max_tokens=1))
    assert Intake(model, 100, 0).prompt(request)[0].runs == ()


def test_flashinfer_is_not_for_them(
    tiny_models: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models("gemma3").language
    monkeypatch.setattr(model, "device", torch.device("cuda:0"))
    monkeypatch.setattr(model, "dtype", torch.bfloat16)
    assert backends.choose(model, EngineConfig()) == "sdpa"
    with pytest.raises(ConfigError, match="attend in both directions"):
        backends.choose(model, EngineConfig(attention="flashinfer"))
