"""What a language engine's steps take, beside what the device could do at best.

    python benchmarks/engine.py                     # small random model, two cores
    python benchmarks/engine.py --device cuda       # Qwen2.5-VL-7B's shape, random weights

Prefill: from handing in one prompt of text to its first token, the engine idle. Decode: from step
to step of the engine while all sequences decode, each with ``--context`` tokens behind it; on a GPU
once more with each step launched when the last one's tokens have been read. There they stand
beside a large matrix product, a copy within the device and the time to read the weights (and KV) at
that copy's speed; on a CPU, step by step, beside the plain model's own step on the same batch.
"""

from __future__ import annotations

import json
import os
import queue
import statistics
import tempfile
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import tyro
from rich.console import Console
from transformers import DynamicCache, Qwen2_5_VLConfig

from triptych.config import EngineConfig, ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.engine.backends import choose, compile_layers
from triptych.engine.loop import Engine
from triptych.engine.messages import AddRequest, Cancel, StepOutput
from triptych.engine.sequence import Phase
from triptych.models.language import LanguageModel
from triptych.models.loading import load_language
from triptych.request import Sampling
from triptych.single import keep_freed_memory

TURNS = 5
"""Batches whose steps are compared, on a CPU."""
STEP_S = 120.0
"""Longest wait for any step."""
TEXT_7B = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "max_position_embeddings": 128000,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]},
}

console = Console(width=110)


@dataclass(frozen=True)
class Config:
    """The language engine's steps, timed."""

    device: str = "cpu"
    model: Path | None = None
    """Folder of a model; by default a small one, or on a GPU the shape of Qwen2.5-VL-7B."""
    prompts: tuple[int, ...] = ()
    """Tokens of the prompts that are prefilled alone."""
    batches: tuple[int, ...] = ()
    """Sequences that decode together."""
    context: int = 0
    """Tokens behind each of them."""
    steps: int = 40
    """Decode steps of each batch."""
    chunk_tokens: int = 2048
    attention: Literal["auto", "flashinfer", "sdpa"] = "auto"
    compile: bool = True
    kv_mib: int = 0
    """0: what the batches need."""
    threads: int = 1
    """CPU threads, on a CPU."""
    json: Path | None = None


@dataclass
class Figures:
    about: dict[str, str]
    values: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: float, unit: str, note: str = "") -> None:
        self.values[f"{name} [{unit}]"] = value
        console.print(f"  {name}: {value:.4g} {unit}{f'  ({note})' if note else ''}")


class Subject:
    """An engine whose outputs are timed on its own thread."""

    def __init__(self, model: LanguageModel, config: EngineConfig) -> None:
        self._outputs: queue.SimpleQueue[tuple[float, StepOutput]] = queue.SimpleQueue()
        self._n = 0
        self.config = config
        self.vocabulary = range(10, model.vocab_size - 10)
        self.engine = Engine(
            model, None, config, lambda out: self._outputs.put((time.perf_counter(), out))
        )
        self.engine.start().result(600)

    def add(self, n_prompt: int, n_answer: int) -> str:
        self._n += 1
        name = f"r{self._n}"
        rows = self.engine.model.row_token_ids
        ids = torch.randint(
            self.vocabulary.start,
            self.vocabulary.stop,
            (n_prompt,),
            generator=torch.Generator().manual_seed(self._n),
        )
        tokens = tuple(t if t not in rows else self.vocabulary.start for t in ids.tolist())
        sampling = Sampling(max_tokens=n_answer, temperature=0)
        self.engine.submit(
            AddRequest(
                request_id=name, token_ids=tokens, items=(), sampling=sampling, keep_kv=False
            )
        )
        return name

    def until_tokens(self, n: int) -> float:
        """When a step brought ``n`` tokens at once."""
        while True:
            at, output = self._outputs.get(timeout=STEP_S)
            if output.failed:
                raise output.failed[0][1]
            if len(output.tokens) >= n:
                return at

    def prefill_s(self, n_tokens: int, repeats: int) -> float:
        """Median."""
        found = []
        for _ in range(repeats):
            began = time.perf_counter()
            self.add(n_tokens, 1)
            found.append(self.until_tokens(1) - began)
        return statistics.median(found)

    def decode_s(self, batch: int, context: int, steps: int) -> tuple[float, float]:
        """Median and mean of the steps that bring a token to every one of ``batch``."""
        names = [self.add(context, steps + batch + 8) for _ in range(batch)]
        times = [self.until_tokens(batch) for _ in range(steps)]
        for name in names:
            self.engine.submit(Cancel(name))
        time.sleep(0.2)
        while not self._outputs.empty():
            self._outputs.get()
        gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
        return statistics.median(gaps), statistics.fmean(gaps)

    def replay_s(self, batch: int) -> float | None:
        """What the device computes of such a step, without the host between steps; None where no
        step is captured. After ``decode_s``: it computes that load's last step again."""
        graphs = self.engine._runner.graphs
        if graphs is None:
            return None
        graph = graphs._captured[graphs._sizes[bisect_left(graphs._sizes, batch)]].graph
        return median_s(graph.replay)


def make_model(config: Config, folder: Path) -> ModelConfig:
    """Its dtype: bfloat16 on a GPU, float32 on a CPU."""
    if config.model is not None:
        return ModelConfig(str(config.model), device=config.device, compile=config.compile)
    if config.device == "cpu":
        return ModelConfig(str(make_tiny_model(folder / "tiny", "qwen2_5_vl")))
    vision = {"depth": 2, "hidden_size": 1280, "out_hidden_size": 3584, "num_heads": 16}
    settings = Qwen2_5_VLConfig(
        text_config=TEXT_7B, vision_config=vision, tie_word_embeddings=False
    )
    settings.save_pretrained(folder)
    return ModelConfig(
        str(folder), "bfloat16", config.device, load_format="dummy", compile=config.compile
    )


def median_s(work: Any, repeats: int = 10) -> float:
    """Of one call, on the current CUDA device."""
    work()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    gaps = [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]
    return statistics.median(gaps) / 1000


def limits(device: str) -> tuple[float, float]:
    """(TFLOP/s of a large product, GB/s that a copy reads)."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    product = 2 * 8192**3 / median_s(lambda: a @ a) / 1e12
    source = torch.empty(1 << 31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / median_s(lambda: target.copy_(source)) / 1e9
    return product, copied


def on_gpu(config: Config, model: LanguageModel, subject: Subject, figures: Figures) -> None:
    product, copied = limits(config.device)
    weights = (*model._decoder.parameters(), *model._outer.parameters())
    parameters = sum(weight.numel() for weight in weights)
    embedding = model.vocab_size * model.hidden_size
    read_s = 2 * (parameters - embedding) / copied / 1e9
    kv_token = subject.engine.kv.block_nbytes / subject.engine.kv.block_size
    figures.add("8192³ product", product, "TFLOP/s")
    figures.add("copy, bytes read and written", copied, "GB/s")
    figures.add("reading the weights at that speed", 1000 * read_s, "ms")
    for n in config.prompts or (2840, 8192, 16384, 21691):
        took = subject.prefill_s(n, 5)
        work = 2 * (parameters - 2 * embedding) * n
        work += 4 * n * n / 2 * TEXT_7B["num_hidden_layers"] * model.hidden_size  # type: ignore[operator]
        rate = work / took / 1e12
        figures.add(f"prefill of {n} tokens", 1000 * took, "ms", f"{rate:.0f} TFLOP/s")
        figures.add(f"prefill of {n} tokens / product", rate / product, "x")
    for batch in config.batches or (1, 16, 64):
        median, mean = subject.decode_s(batch, config.context or 2048, config.steps)
        least = read_s + batch * (config.context or 2048) * kv_token / copied / 1e9
        figures.add(f"decode step of {batch}", 1000 * median, "ms", f"mean {1000 * mean:.2f}")
        figures.add(f"decode step of {batch} / reading weights and KV", median / least, "x")
        if (alone := subject.replay_s(batch)) is not None:
            figures.add(f"decode step of {batch}, its captured kernels alone", 1000 * alone, "ms")
    subject.engine.close(10)
    waiting = Subject(model, replace(subject.config, run_ahead="off"))
    for batch in config.batches or (1, 16, 64):
        median, mean = waiting.decode_s(batch, config.context or 2048, config.steps)
        name = f"decode step of {batch}, launched when the last one is read"
        figures.add(name, 1000 * median, "ms", f"mean {1000 * mean:.2f}")
    waiting.engine.close(10)


@torch.inference_mode()
def plain_steps(model: LanguageModel, batch: int, context: int, steps: int) -> Iterator[float]:
    """Seconds of each step of the model's own decoder and head with its own cache, the whole batch
    at once."""
    cache = DynamicCache(config=model._decoder.config)
    shape = (model.axes, batch, -1) if model.axes > 1 else (batch, -1)
    positions = torch.arange(context + steps)
    prompt = model.embed(torch.randint(10, model.vocab_size - 10, (batch * context,)))

    def run(embeds: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        model._use("sdpa")
        out = model._decoder(
            inputs_embeds=embeds.view(batch, -1, model.hidden_size),
            position_ids=where.expand(shape),
            past_key_values=cache,
            use_cache=True,
        )
        return model.logits(out.last_hidden_state[:, -1]).argmax(-1)

    token = run(prompt, positions[:context])
    for i in range(steps):
        began = time.perf_counter()
        token = run(model.embed(token), positions[context + i : context + i + 1])
        token.tolist()
        yield time.perf_counter() - began


def engine_steps(
    model: LanguageModel, config: EngineConfig, batch: int, context: int, steps: int
) -> Iterator[float]:
    """Seconds of each step of an engine whose loop is turned here, while all decode."""
    engine = Engine(model, None, config, lambda output: None)
    ids = torch.randint(10, model.vocab_size - 10, (batch, context)).tolist()
    for number, prompt in enumerate(ids):
        tokens = tuple(t if t not in model.row_token_ids else 10 for t in prompt)
        sampling = Sampling(max_tokens=steps + batch + 8, temperature=0)
        engine.submit(AddRequest(f"r{number}", tokens, (), sampling, keep_kv=False))
    engine._take_messages(wait=False)
    while engine._scheduler.queue or any(
        sequence.phase is not Phase.DECODE for sequence in engine._scheduler.running
    ):
        engine._turn()
    for _ in range(steps):
        began = time.perf_counter()
        engine._turn()
        yield time.perf_counter() - began


def on_cpu(config: Config, model: LanguageModel, engine: EngineConfig, figures: Figures) -> None:
    """Step by step in turns, on one core: a shared machine is twice as fast in one second as in the
    next, and one core as another."""
    keep_freed_memory()  # as workers do
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    context = config.context or 64
    for batch in config.batches or (1, 8, 32):
        ours, plain = zip(
            *(
                pair
                for _ in range(TURNS)
                for pair in zip(
                    engine_steps(model, engine, batch, context, config.steps),
                    plain_steps(model, batch, context, config.steps),
                    strict=True,
                )
            ),
            strict=True,
        )
        low, median, high = statistics.quantiles(a / b for a, b in zip(ours, plain, strict=True))
        figures.add(f"decode step of {batch}", 1000 * statistics.median(ours), "ms")
        figures.add(f"the plain model's step of {batch}", 1000 * statistics.median(plain), "ms")
        note = f"of {len(ours)} pairs; a quarter below {low:.2f}, a quarter above {high:.2f}"
        figures.add(f"decode step of {batch} / plain", median, "x", note)


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory(prefix="triptych-engine-") as folder:
        began = time.perf_counter()
        model_config = make_model(config, Path(folder))
        model = load_language(model_config)
        console.print(f"loaded in {time.perf_counter() - began:.1f} s")
        n_tokens = max(config.batches or (64,)) * ((config.context or 2048) + 256)
        n_tokens = max(n_tokens, *config.prompts, 0) + 256
        kv_mib = config.kv_mib or (8 if config.device == "cpu" else -(-n_tokens * 57344 >> 20))
        engine_config = EngineConfig(
            kv_mib=abs(kv_mib),
            chunk_tokens=config.chunk_tokens,
            attention=config.attention,
            threads=config.threads if config.device == "cpu" else 0,
        )
        compile_layers(model, engine_config, model_config)
        about = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": "cpu"
            if config.device == "cpu"
            else torch.cuda.get_device_name(config.device),
            "attention": choose(model, engine_config),
            "compiled": str(model.compiled),
        }
        console.print(about)
        figures = Figures(about)
        if config.device == "cpu":
            on_cpu(config, model, engine_config, figures)
        else:
            began = time.perf_counter()
            subject = Subject(model, engine_config)
            figures.add("ready after", time.perf_counter() - began, "s")
            on_gpu(config, model, subject, figures)
        if config.json:
            config.json.write_text(json.dumps(asdict(figures), indent=2))


if __name__ == "__main__":
    main()
