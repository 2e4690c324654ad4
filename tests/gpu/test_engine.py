"""FlashInfer, compiled layers and captured decode steps against torch's own attention, in bfloat16,
with the same tokens forced on both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig

from triptych.config import EngineConfig, ModelConfig
from triptych.engine.attention import Part
from triptych.engine.backends import Compute, compile_layers, open_attention
from triptych.engine.flash_steps import MixedStep
from triptych.engine.kv_cache import KVCache, KVShape
from triptych.engine.runner import Prompt
from triptych.engine.selftest import selftest
from triptych.engine.sequence import Phase, Sequence
from triptych.engine.work import Work
from triptych.models.language import LanguageModel
from triptych.models.loading import load_language
from triptych.request import Sampling

pytest.importorskip("flashinfer")
DEVICE = f"cuda:{max(0, torch.cuda.device_count() - 1)}"
BLOCK = 16
PROMPTS = (40, 21, 3)
STEPS = 20


def both(
    parts: list[Part], n_decodes: int, qkv: tuple[Tensor, ...], window: int | None
) -> tuple[Tensor, Tensor]:
    """FlashInfer's and torch's own attention over the same cache, whose blocks lie anywhere."""
    query, key, _ = qkv
    dim, stop = query.shape[-1], max(part.stop for part in parts)
    n_blocks = sum(-(-part.stop // BLOCK) for part in parts) + 1
    shape = KVShape(2, key.shape[1], dim, torch.bfloat16)
    memory = torch.zeros(n_blocks * shape.block_nbytes(BLOCK), dtype=torch.uint8, device=DEVICE)
    kv = KVCache(memory, shape, BLOCK)
    kv.data.normal_()
    order = torch.randperm(n_blocks - 1).tolist()
    tables = {part.place: [order.pop() for _ in range(-(-part.stop // BLOCK))] for part in parts}
    layer = torch.nn.Module()
    found = []
    for name in ("flashinfer", "sdpa"):
        attention = open_attention(name, kv, 4, -(-stop // BLOCK))
        for part in parts:
            attention.place(part.place, tables[part.place], part.stop)
        context = attention.plan(parts, n_decodes)
        for index in range(2):
            layer.layer_idx = index  # type: ignore[assignment]
            out = context.attend(layer, *qkv, dim**-0.5, window)
        found.append(out.float())
    return found[0], found[1]


@pytest.mark.parametrize(
    ("window", "heads", "kv_heads", "dim"), [(None, 7, 1, 128), (None, 8, 8, 128), (5, 32, 8, 128)]
)
def test_equals_torch(window: int | None, heads: int, kv_heads: int, dim: int) -> None:
    """Every other kind of kernel takes a minute to compile."""
    torch.manual_seed(0)
    parts = [Part(0, 17, 18), Part(3, 0, 1), Part(1, 0, 70), Part(2, 40, 47)]
    n = sum(part.stop - part.start for part in parts)
    qkv = tuple(
        torch.randn(1, h, n, dim, device=DEVICE, dtype=torch.bfloat16)
        for h in (heads, kv_heads, kv_heads)
    )
    torch.testing.assert_close(*both(parts, 2, qkv, window), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("window", [None, 700])
def test_large_chunks_equal_torch(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt's beginning, and behind blocks that lie anywhere; a decode and a small chunk
    beside them."""
    torch.manual_seed(0)
    large: list[int] = []
    plan = MixedStep._plan
    monkeypatch.setattr(
        MixedStep, "_plan", lambda step, kind: (large.append(len(step._large)), plan(step, kind))[1]
    )
    parts = [Part(0, 17, 18), Part(1, 1100, 2403), Part(2, 40, 47), Part(3, 0, 1024)]
    n = sum(part.stop - part.start for part in parts)
    # As compiled layers hand them over: parts of wider rows.
    wide = torch.randn(1, n, 7 + 1 + 1, 128, device=DEVICE, dtype=torch.bfloat16)
    qkv = wide.transpose(1, 2).split([7, 1, 1], 1)
    torch.testing.assert_close(*both(parts, 1, qkv, window), atol=2e-2, rtol=2e-2)
    hopper = torch.cuda.get_device_capability(DEVICE)[0] == 9
    assert large == [2 if hopper else 0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("model")
    text = {
        "hidden_size": 896,
        "num_hidden_layers": 3,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "intermediate_size": 512,
        "vocab_size": 1024,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]},
    }
    vision = {"depth": 1, "hidden_size": 64, "out_hidden_size": 896, "num_heads": 2}
    tokens = {"image_token_id": 1000, "video_token_id": 1001, "vision_start_token_id": 1002}
    settings = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    settings.save_pretrained(folder)
    config = ModelConfig(str(folder), "bfloat16", DEVICE, "dummy", compile_cache=folder / "code")
    model = load_language(config)
    compile_layers(model, EngineConfig(), config)
    assert model.compiled
    return model


class Forced:
    """Requests whose answers are given, each in blocks of its own, which it gets as it grows."""

    def __init__(self, model: LanguageModel, config: EngineConfig, chunk: int) -> None:
        shape = KVShape(model.num_layers, model.num_kv_heads, model.head_dim, model.dtype)
        memory = torch.zeros(40 * shape.block_nbytes(BLOCK), dtype=torch.uint8, device=DEVICE)
        self.compute = Compute(model, memory, config, 128)
        self.compute.warm_up()
        if config.attention != "sdpa":
            self.compute.capture()
            assert self.compute.runner.graphs is not None
        self.runner = self.compute.runner
        self.chunk = chunk
        self.model = model
        self.blocks: dict[str, range] = {}
        generator = torch.Generator().manual_seed(1)
        self.ids = [
            torch.randint(10, 900, (n + STEPS,), generator=generator).tolist() for n in PROMPTS
        ]

    def add(self, name: str, i: int, blocks: range) -> Sequence:
        n = PROMPTS[i]
        sequence = Sequence(name, n, n + STEPS, Sampling(max_tokens=STEPS), 0.0)
        self.blocks[name] = blocks
        prompt = Prompt.build(self.model, self.ids[i][:n], (), [])
        sequence.next_position = prompt.next_position
        self.runner.add(name, prompt)
        return sequence

    def prefill(self, sequence: Sequence) -> Tensor:
        """Logits of the next token."""
        for start in range(sequence.computed, sequence.n_prompt, self.chunk):
            stop = min(sequence.n_prompt, start + self.chunk)
            logits = self.runner.logits([self.work(sequence, start, stop)])
            sequence.computed = stop
        assert logits is not None
        sequence.phase = Phase.DECODE
        return logits.clone()

    def decode(self, sequences: list[Sequence]) -> Tensor:
        work = [self.work(s, s.computed, s.computed + 1) for s in sequences]
        logits = self.runner.logits(work)
        assert logits is not None
        for sequence in sequences:
            sequence.computed += 1
        return logits.clone()

    def work(self, sequence: Sequence, start: int, stop: int) -> Work:
        sequence.blocks = tuple(self.blocks[sequence.request_id][: -(-stop // BLOCK)])
        return Work(sequence, start, stop)

    def preempt(self, sequence: Sequence, blocks: range) -> None:
        self.runner.preempt(sequence.request_id, sequence.output)
        sequence.preempt()
        self.blocks[sequence.request_id] = blocks


def forced(
    model: LanguageModel,
    config: EngineConfig,
    chunk: int,
    *,
    preempts: bool = False,
    finds: bool = False,
) -> list[Tensor]:
    """Logits of ``STEPS`` forced tokens after each of ``PROMPTS``.

    ``preempts``: the first is computed again from its first token, in other blocks, amid its
    answer. ``finds``: the first two blocks of its prompt are those of an earlier request.
    """
    f = Forced(model, config, chunk)
    sequences = [f.add(f"r{i}", i, range(5 * i, 5 * i + 5)) for i in range(len(PROMPTS))]
    if finds:
        f.prefill(f.add("earlier", 0, range(5)))
        f.runner.forget("earlier")
        sequences[0].computed = 2 * BLOCK
    found = [f.prefill(sequence) for sequence in sequences]
    for step in range(STEPS):
        for i, sequence in enumerate(sequences):
            sequence.output.append(f.ids[i][PROMPTS[i] + step])
        if preempts and step == STEPS // 2:
            f.preempt(sequences[0], range(20, 25))
            again = f.prefill(sequences[0])
            found.append(torch.cat([again, f.decode(sequences[1:])]))
        else:
            found.append(f.decode(sequences))
    return found


@pytest.mark.parametrize(
    ("chunk", "preempts", "finds"), [(16, False, False), (64, False, True), (64, True, False)]
)
def test_captured_steps_give_the_logits_of_plain_ones(
    model: LanguageModel, chunk: int, preempts: bool, finds: bool
) -> None:
    """Sequences grow into their fourth block while they decode."""
    config = EngineConfig(chunk_tokens=64, max_sequences=4)
    ours = forced(model, config, chunk, preempts=preempts, finds=finds)
    with torch.compiler.set_stance("force_eager"):
        theirs = forced(model, EngineConfig(attention="sdpa", chunk_tokens=64), chunk)
    scale = max(float(rows.abs().max()) for rows in theirs)
    for got, expected in zip(ours, theirs, strict=True):
        assert float((got - expected).abs().max()) <= 0.05 * scale


def test_the_self_test_goes_through_it(model: LanguageModel, tmp_path: Path) -> None:
    assert selftest(model, EngineConfig(chunk_tokens=64)) < 1
