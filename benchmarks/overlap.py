"""What ``--overlap`` costs and brings: adaptive against always and off, in one run.

    python benchmarks/overlap.py [--rounds 5] [--requests 16] [--concurrency 8] [--encode-ms 12]

An engine with a small random model, in this process, and requests in a closed loop: most with
images, some of text alone. The images of all requests come out of one encoder in the order of the
requests, each after a fixed time that takes no CPU, so that the engine alone is measured. The three
ways take turns, round after round over the same requests; figures are means over a round's
requests, and ratios are those of medians over rounds, with the quartiles of the rounds' own ratios.
They are to reach: TTFT within 5 % of "always", throughput and TPOT within 2 % of "off".
"""

from __future__ import annotations

import argparse
import queue
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table

from triptych.config import EngineConfig, ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.engine.loop import Engine
from triptych.engine.messages import AddRequest, ItemLanded, StepOutput
from triptych.engine.scheduler import Overlap
from triptych.engine.sequence import ItemSpan
from triptych.models.language import LanguageModel
from triptych.models.loading import load_language
from triptych.request import Sampling

IMAGES, ROWS, TEXT = 4, 64, 40
"""Of a request: images, rows of each, tokens of text."""
GRID = (1, 16, 16)
ANSWER = 24
WORDS = 900
STEP_S, CLOSE_S = 60.0, 20.0
console = Console(highlight=False)


@dataclass(frozen=True)
class Figures:
    """Of one round."""

    ttft: float
    """Mean seconds from a request's arrival to its first token."""
    tpot: float
    """Mean seconds between two of its tokens."""
    throughput: float
    """Prompt and answer tokens a second."""


@dataclass
class Round:
    """A closed loop over one engine; ``run`` once."""

    model: LanguageModel
    overlap: Overlap
    requests: int
    concurrency: int
    encode_s: float
    chunk_tokens: int
    _arrived: dict[str, float] = field(default_factory=dict)
    _first: dict[str, float] = field(default_factory=dict)
    _last: dict[str, float] = field(default_factory=dict)

    def run(self) -> Figures:
        outputs: queue.SimpleQueue[tuple[float, StepOutput]] = queue.SimpleQueue()
        config = EngineConfig(
            kv_mib=16, chunk_tokens=self.chunk_tokens, threads=1, overlap=self.overlap
        )

        def emit(output: StepOutput) -> None:
            outputs.put((time.perf_counter(), output))

        engine = Engine(self.model, None, config, emit)
        engine.start().result()
        images: queue.SimpleQueue[tuple[str, int] | None] = queue.SimpleQueue()
        encoder = threading.Thread(target=self._encode, args=(engine, images))
        encoder.start()
        began = time.perf_counter()
        tokens = sum(self._add(engine, images, n) for n in range(self.concurrency))
        added = self.concurrency
        while len(self._last) < self.requests:
            at, output = outputs.get(timeout=STEP_S)
            assert not output.failed, output.failed
            for event in output.tokens:
                self._first.setdefault(event.request_id, at)
                if event.finish:
                    self._last[event.request_id] = at
                    if added < self.requests:
                        tokens += self._add(engine, images, added)
                        added += 1
        took = time.perf_counter() - began
        images.put(None)
        encoder.join()
        engine.close(CLOSE_S)
        names = self._arrived
        return Figures(
            statistics.fmean(self._first[n] - self._arrived[n] for n in names),
            statistics.fmean((self._last[n] - self._first[n]) / (ANSWER - 1) for n in names),
            tokens / took,
        )

    def _add(
        self, engine: Engine, images: queue.SimpleQueue[tuple[str, int] | None], number: int
    ) -> int:
        """Every fourth request is of text alone. Its tokens, those of the answer included."""
        name, n_images = str(number), 0 if number % 4 == 3 else IMAGES
        draw = torch.Generator().manual_seed(number)

        def text(n: int) -> list[int]:
            return torch.randint(10, WORDS, (n,), generator=draw).tolist()

        ids = text(TEXT // 2)
        for _ in range(n_images):
            ids += [self.model.image_token_id] * ROWS + text(2)
        ids += text(TEXT // 2)
        spans = (ItemSpan(ROWS, GRID),) * n_images
        self._arrived[name] = time.perf_counter()
        engine.submit(
            AddRequest(name, tuple(ids), spans, Sampling(max_tokens=ANSWER, temperature=0))
        )
        for item in range(n_images):
            images.put((name, item))
        return len(ids) + ANSWER

    def _encode(self, engine: Engine, images: queue.SimpleQueue[tuple[str, int] | None]) -> None:
        rows = torch.randn(self.model.planes, ROWS, self.model.hidden_size)
        while (image := images.get()) is not None:
            time.sleep(self.encode_s)
            engine.submit(ItemLanded(*image, rows))


def measure(model: LanguageModel, args: argparse.Namespace) -> dict[Overlap, list[Figures]]:
    ways: tuple[Overlap, ...] = get_args(Overlap)
    found: dict[Overlap, list[Figures]] = {way: [] for way in ways}
    for number in range(args.rounds + 1):  # the first is a warm-up
        for shift in range(len(ways)):
            way = ways[(number + shift) % len(ways)]
            figures = Round(
                model,
                way,
                args.requests,
                args.concurrency,
                args.encode_ms / 1000,
                args.chunk_tokens,
            ).run()
            if number:
                found[way].append(figures)
    return found


def show(found: dict[Overlap, list[Figures]]) -> None:
    table = Table("overlap", "TTFT ms", "TPOT ms", "tokens/s")
    for way, rounds in found.items():
        table.add_row(
            way,
            f"{statistics.median(r.ttft for r in rounds) * 1e3:.1f}",
            f"{statistics.median(r.tpot for r in rounds) * 1e3:.2f}",
            f"{statistics.median(r.throughput for r in rounds):.0f}",
        )
    console.print(table)
    for what, name, other in (
        ("TTFT", "ttft", "always"),
        ("TPOT", "tpot", "off"),
        ("throughput", "throughput", "off"),
        ("TTFT", "ttft", "off"),
    ):
        mine = [getattr(r, name) for r in found["adaptive"]]
        theirs = [getattr(r, name) for r in found[other]]  # type: ignore[index]
        ratio = statistics.median(mine) / statistics.median(theirs)
        low, _, high = statistics.quantiles([a / b for a, b in zip(mine, theirs, strict=True)])
        console.print(f"{what}, adaptive / {other}: {ratio:.3f}  (quartiles {low:.3f}, {high:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--encode-ms", type=float, default=12.0)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("quartiles need two rounds at least")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = make_tiny_model(Path(folder) / "model", "qwen2_5_vl")
        model = load_language(ModelConfig(str(path), dtype="float32"))
        show(measure(model, args))


if __name__ == "__main__":
    main()
