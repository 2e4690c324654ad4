"""The engine against Transformers' ``generate``: tokens equal, logits within 1e-4, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.end_to_end.engine_driver import GREEDY, Case, Driver, Family
from tests.families import EVERY
from triptych.config import Dtype, EngineConfig
from triptych.engine.kv_cache import KVCache
from triptych.engine.messages import Cancel, Reserve, StartDecode
from triptych.engine.selftest import selftest
from triptych.models.language import LanguageModel

torch.set_num_threads(1)
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=EVERY)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def cases(family: Family) -> list[Case]:
    return [family.case("text", 0), family.case("one", 1), family.case("three", 3, n_text=20)]


@pytest.fixture
def seen(family: Family) -> Iterator[list[Tensor]]:
    with logits_seen(family.language) as rows:
        yield rows


@contextmanager
def logits_seen(language: LanguageModel) -> Iterator[list[Tensor]]:
    """Rows of logits in the order in which tokens were sampled."""
    rows: list[Tensor] = []
    original = language.logits

    def logits(hidden: Tensor) -> Tensor:
        out = original(hidden)
        rows.extend(out.clone())
        return out

    with patch.object(language, "logits", logits):
        yield rows


def check(driver: Driver, seen: list[Tensor], case: Case, name: str = "") -> None:
    """``seen`` holds a row for every token of ``driver``, in order."""
    name = name or case.name
    assert driver.failed == {}
    assert driver.answer(name) == case.answer
    rows = [row for row, event in zip(seen, driver.tokens, strict=True) if event.request_id == name]
    assert case.logits is not None
    torch.testing.assert_close(torch.stack(rows), case.logits, atol=TOLERANCE, rtol=0)


def test_answers_vary(cases: list[Case]) -> None:
    """Equality says something only if the model does."""
    assert len({tuple(case.answer) for case in cases}) == 3
    assert all(len(set(case.answer)) > 3 for case in cases)


@pytest.mark.parametrize("chunk_tokens", [512, 7])
def test_alone(family: Family, cases: list[Case], seen: list[Tensor], chunk_tokens: int) -> None:
    with Driver(family.language, chunk_tokens=chunk_tokens, prefix_cache=False) as driver:
        for case in cases:
            driver.add(case)
            driver.finish(case.name)
    for case in cases:
        check(driver, seen, case)
        n_chunks = -(-len(case.token_ids) // chunk_tokens)
        found = len(driver.notes(case.name, "prefill"))
        assert found == n_chunks or (found > n_chunks and family.language.longest_run)


@pytest.mark.parametrize(("chunk_tokens", "block_size"), [(512, 16), (24, 4), (5, 3)])
def test_together(
    family: Family, cases: list[Case], seen: list[Tensor], chunk_tokens: int, block_size: int
) -> None:
    """Chunks of one prompt beside decodes of others, blocks of several sizes."""
    with Driver(family.language, chunk_tokens=chunk_tokens, block_size=block_size) as driver:
        names = [driver.add(case, name=f"{case.name} {i}") for i in range(2) for case in cases]
        driver.finish(*names)
        assert driver.free_blocks == driver.engine.kv.n_blocks
    for i in range(2):
        for case in cases:
            check(driver, seen, case, f"{case.name} {i}")


@pytest.mark.parametrize("chunk_tokens", [512, 7])
def test_kv_handed_to_another_engine(
    family: Family, cases: list[Case], seen: list[Tensor], chunk_tokens: int
) -> None:
    """Prefill here, decode there, with other block numbers: blocks are copied as bytes."""
    with (
        Driver(family.language, chunk_tokens=chunk_tokens) as prefill,
        Driver(family.language) as decode,
    ):
        decode.engine.submit(Reserve("taken", 20))
        for case in cases:
            prefill.add(case, keep_kv=True)
            prefill.until(lambda name=case.name: name in prefill.prefilled)  # type: ignore[misc]
        first_rows = list(seen)
        seen.clear()
        for case in cases:
            hand_over(case, prefill, decode)
        decode.finish(*(case.name for case in cases))
        prefill.engine.submit(Cancel("unknown"))
    assert prefill.free_blocks == prefill.engine.kv.n_blocks
    assert [event.finish for event in prefill.tokens] == ["", "", ""]
    for row, case in zip(first_rows, cases, strict=True):
        assert prefill.answer(case.name) + decode.answer(case.name) == case.answer
        assert [event.index for event in decode.events(case.name)] == list(range(1, 12))
        mine = [r for r, e in zip(seen, decode.tokens, strict=True) if e.request_id == case.name]
        assert case.logits is not None
        got = torch.stack([row, *mine])
        torch.testing.assert_close(got, case.logits, atol=TOLERANCE, rtol=0)


def hand_over(case: Case, prefill: Driver, decode: Driver) -> None:
    """What the transfer plane does, as one copy."""
    name, n_prompt = case.name, len(case.token_ids)
    decode.engine.submit(Reserve(name, n_prompt + GREEDY.max_tokens))
    decode.until(lambda: name in decode.reserved)
    progress = prefill.progress[name]
    assert progress[-1].computed == n_prompt
    for earlier, later in zip(progress, progress[1:], strict=False):
        assert later.blocks[: len(earlier.blocks)] == earlier.blocks
        assert len(earlier.blocks) == earlier.computed // 16
    there, here = progress[-1].blocks, decode.reserved[name][: len(progress[-1].blocks)]
    assert len(there) == -(-n_prompt // 16) and there != here
    copy_blocks(prefill.engine.kv, there, decode.engine.kv, here)
    done = prefill.prefilled[name]
    decode.engine.submit(StartDecode(name, n_prompt, done.first, done.next_position, GREEDY))
    prefill.engine.submit(Cancel(name))


def copy_blocks(
    source: KVCache, there: tuple[int, ...], target: KVCache, here: tuple[int, ...]
) -> None:
    memory, other = source.data.flatten().view(torch.uint8), target.data.flatten().view(torch.uint8)
    size = source.block_nbytes
    for a, b in zip(there, here, strict=True):
        start, end = source.offset(a), target.offset(b)
        other[end : end + size] = memory[start : start + size]


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 0.3)])
def test_selftest_accepts(family: Family, dtype: Dtype, bound: float) -> None:
    for block_size in (16, 3):
        assert selftest(family.load(dtype), EngineConfig(block_size=block_size)) < bound
