"""What is planned for FlashInfer's kernels, with plain ones in their place, against torch's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tests import plain_kernels
from tests.end_to_end.engine_driver import Case, Driver, Family
from triptych.config import EngineConfig
from triptych.engine import backends, flash_attention, flash_steps
from triptych.engine.attention import Part, SdpaAttention, paged_attention
from triptych.engine.flash_attention import CONTEXT, FlashAttention
from triptych.engine.flash_steps import DecodeStep
from triptych.engine.kv_cache import KVCache, KVShape
from triptych.errors import ConfigError
from triptych.models.compiled import compile_blocks
from triptych.models.fused import fuse_products, merge_products

torch.set_num_threads(1)
HEADS, KV_HEADS, DIM, SIZE, LAYERS, N_BLOCKS = 4, 2, 8, 4, 3, 24
SCALING = DIM**-0.5


class Layer(nn.Module):
    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx


@pytest.fixture(autouse=True)
def _small_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention, "WORKSPACE_NBYTES", 64)


def cache() -> KVCache:
    shape = KVShape(LAYERS, KV_HEADS, DIM, torch.float32)
    memory = torch.zeros(N_BLOCKS * shape.block_nbytes(SIZE), dtype=torch.uint8)
    kv = KVCache(memory, shape, SIZE)
    kv.data.normal_()
    return kv


def flash(kv: KVCache, places: int = 6, dense: int = 0) -> FlashAttention:
    return FlashAttention(kv, places, 6, kv.n_blocks - 1, plain_kernels, KVCache.write, dense)


def attend(context: object, layer: int, qkv: tuple[Tensor, ...], window: int | None) -> Tensor:
    out, _ = paged_attention(
        Layer(layer), *qkv, None, context=context, scaling=SCALING, sliding_window=window
    )  # type: ignore[arg-type]
    return out


def tokens(n: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(1, heads, n, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))  # type: ignore[return-value]


CHUNKS = [Part(1, 0, 7), Part(5, 3, 21), Part(3, 0, 3), Part(0, 8, 17)]


@pytest.mark.parametrize("windows", [(None,) * LAYERS, (3, None, 3)])
@pytest.mark.parametrize(
    ("n_decodes", "n_chunks", "dense"),
    [(0, 1, 0), (2, 0, 0), (3, 2, 0), (0, 1, 7), (1, 4, 7), (1, 4, 8), (2, 4, 9), (1, 3, 1)],
)
def test_a_mixed_step(
    n_decodes: int, n_chunks: int, dense: int, windows: tuple[int | None, ...]
) -> None:
    """``dense``: chunks of so many tokens are large ones, the first or the last among small ones,
    of a prompt's beginning or not."""
    torch.manual_seed(0)
    kv = cache()
    other = KVCache(
        kv.data.clone().view(-1).view(torch.uint8),
        KVShape(LAYERS, KV_HEADS, DIM, torch.float32),
        SIZE,
    )
    subject, reference = flash(kv, dense=dense), SdpaAttention(other, 6, 6)
    parts = [Part(4, 5, 6), Part(2, 16, 17), Part(0, 2, 3)][:n_decodes]
    parts += CHUNKS[:n_chunks]
    order = torch.randperm(N_BLOCKS - 1).tolist()
    for part in parts:
        table = [order.pop() for _ in range(-(-part.stop // SIZE))]
        subject.place(part.place, table, part.stop)
        reference.place(part.place, table, part.stop)
    n = sum(part.stop - part.start for part in parts)
    for _ in range(2):  # a plan does not outlive its step
        ours, theirs = subject.plan(parts, n_decodes), reference.plan(parts, n_decodes)
        for layer, window in enumerate(windows):
            qkv = tokens(n)
            got = attend(ours, layer, qkv, window)
            torch.testing.assert_close(got, attend(theirs, layer, qkv, window), atol=1e-5, rtol=0)


def test_a_step_is_planned_when_the_last_plan_of_its_kind_has_been_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planning writes into the same page-locked memory again. A device that waits, for another
    rank say, may not have read it yet."""
    events: list[str] = []

    class Noted:
        made = 0

        def __init__(self, device: torch.device) -> None:
            Noted.made += 1
            self.number = Noted.made
            events.append(f"mark {self.number}")

        def wait(self) -> None:
            events.append(f"wait {self.number}")

    monkeypatch.setattr(flash_steps, "Mark", Noted)
    plan = plain_kernels.BatchPrefillWithPagedKVCacheWrapper.plan
    monkeypatch.setattr(
        plain_kernels.BatchPrefillWithPagedKVCacheWrapper,
        "plan",
        lambda *args, **more: (events.append("plan"), plan(*args, **more))[1],
    )
    subject = flash(cache())
    subject.place(0, range(3), 12)
    windows = (None, 3, None)
    for start in (0, 4):
        context = subject.plan([Part(0, start, start + 4)], 0)
        for layer, window in enumerate(windows):
            attend(context, layer, tokens(4), window)
        assert isinstance(subject.nearly, Noted)
    nearly = LAYERS - 1
    assert subject.late_layer == nearly
    assert events == [
        "plan", "mark 1", "plan", "mark 2", "mark 3",
        "wait 1", "plan", "mark 4", "wait 2", "plan", "mark 5", "mark 6",
    ]  # fmt: skip
    assert subject.nearly.number == 6


def test_a_long_context_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_steps, "LONGEST_COPY", 16)
    subject = flash(cache(), dense=7)
    parts = [Part(1, 3, 17), Part(5, 3, 16), Part(3, 0, 6)]
    for part in parts:
        subject.place(part.place, range(-(-part.stop // SIZE)), part.stop)
    subject.plan(parts, 0)
    step = subject._step
    assert isinstance(step, flash_steps.MixedStep)
    assert [chunk.part for chunk in step._large] == [parts[1]] and step._small == [*parts[::2]]


def test_a_captured_size_computes_fewer_and_leaves_the_rest_alone() -> None:
    torch.manual_seed(0)
    kv = cache()
    subject = flash(kv)
    subject.heads[0, SCALING] = HEADS
    step = DecodeStep(subject, 4)
    parts = [Part(3, 9, 10), Part(1, 0, 1)]
    subject.place(3, [7, 2, 9], 9)
    subject.place(1, [4], 0)
    before = kv.data.clone()
    step.load(parts)
    subject.enter(step)
    qkv = tokens(4)
    got = attend(CONTEXT, 0, qkv, None)
    changed = {int(block) for block in (kv.data != before).flatten(1).any(1).nonzero()}
    assert changed == {9, 4, kv.n_blocks - 1}
    reference = SdpaAttention(kv, 6, 6)
    for part, table in zip(parts, ([7, 2, 9], [4]), strict=True):
        reference.place(part.place, table, part.stop)
    first = tuple(x[:, :, :2] for x in qkv)
    expected = attend(reference.plan(parts, 2), 0, first, None)
    torch.testing.assert_close(got[:, :2], expected, atol=1e-5, rtol=0)
    step.load(())  # all of it idle
    (wrapper,) = step._wrappers.values()
    step.load(parts)
    step.foresee(parts)
    plans = wrapper.plans
    step.load([Part(3, 10, 11), Part(1, 1, 2)])
    assert wrapper.plans == plans and wrapper.pages[2].tolist() == [3, 2, 1, 1]
    step.load([Part(3, 10, 11)])
    assert wrapper.plans == plans + 1 and wrapper.pages[2].tolist() == [3, 1, 1, 1]
    subject.place(3, [8, 1, 0], 10)  # another sequence, as far as the one before it
    step.load([Part(3, 10, 11)])
    assert wrapper.pages[1].tolist()[:3] == [8, 1, 0]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def open_attention(name: str, kv: KVCache, places: int, max_blocks: int) -> FlashAttention:
        scratch = kv.n_blocks - 1
        return FlashAttention(kv, places, max_blocks, scratch, plain_kernels, KVCache.write)

    monkeypatch.setattr(backends, "choose", lambda model, config: "flashinfer")
    monkeypatch.setattr(backends, "open_attention", open_attention)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    yield
    torch.compiler.reset()


def check(driver: Driver, cases: list[Case]) -> None:
    for case in cases:
        driver.add(case)
    driver.finish(*(case.name for case in cases))
    assert driver.failed == {}
    assert [driver.answer(case.name) for case in cases] == [case.answer for case in cases]


@pytest.mark.usefixtures("plain")
def test_the_engine_on_it_gives_the_answers_of_generate(family: Family) -> None:
    cases = [family.case("text", 0), family.case("one", 1), family.case("three", 3, n_text=20)]
    with Driver(family.language, chunk_tokens=16) as driver:
        check(driver, cases)


@pytest.mark.usefixtures("plain")
def test_layers_are_compiled_once_for_all_steps(family: Family, tmp_path: Path) -> None:
    """Traced but not translated, which needs no compiler."""
    cases = [family.case("text", 0), family.case("one", 1), family.case("three", 3, n_text=20)]
    model = family.load("float32")
    assert compile_blocks(model._decoder, tmp_path, backend="eager") == model.num_layers
    frames = torch._dynamo.utils.counters["frames"]
    with Driver(model, chunk_tokens=16) as driver:
        check(driver, cases[:1])
        compiled = frames["ok"]
        for case in cases[1:]:
            check(driver, [case])
        assert 0 < compiled == frames["ok"]
        assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.usefixtures("plain")
def test_products_of_one_input_are_one_where_layers_are_compiled(
    family: Family, tmp_path: Path
) -> None:
    cases = [family.case("text", 0), family.case("three", 3, n_text=20)]
    model = family.load("float32")
    n_parameters = sum(weight.numel() for weight in model._decoder.parameters())
    assert fuse_products(model._decoder) == 2 * model.num_layers
    assert sum(weight.numel() for weight in model._decoder.parameters()) == n_parameters
    products: list[tuple[int, int]] = []

    def count(graph: GraphModule) -> int:
        return sum(node.target is torch._C._nn.linear for node in graph.graph.nodes)

    def backend(graph: GraphModule, inputs: object) -> object:
        traced = count(graph)
        products.append((traced, count(merge_products(graph))))
        return graph.forward

    compile_blocks(model._decoder, tmp_path, backend)
    with Driver(model, chunk_tokens=16) as driver:
        check(driver, cases)
    assert set(products) == {(7, 4)}


def test_what_cannot_be_had_is_said(family: Family) -> None:
    assert backends.choose(family.language, EngineConfig()) == "sdpa"
    with pytest.raises(ConfigError, match="the model is on cpu"):
        backends.choose(family.language, EngineConfig(attention="flashinfer"))
