"""What ``--overlap`` costs and brings: adaptive against always and off, in one run.

    python benchmarks/overlap.py [--blocks 9] [--requests 16] [--concurrency 8] [--encode-ms 12]

An engine with a small random model, in this process, and requests in a closed loop: most with
images, some of text alone. The images of all requests come out of one encoder in the order of the
requests, each after a fixed time that takes no CPU, so that the engine alone is measured.

Made for a machine that does other things as well. The clock stands still while the engine's thread
waits for a CPU (Linux counts that). A round of one way takes a second, and a block is
one round of each and then one of each in the opposite order, so that whatever becomes slowly faster
or slower is the same for all three. Ratios are those within a block; what is said of them is their
median over the blocks, its 95 % confidence interval (by order statistics: it assumes nothing of how
they are spread) and their quartiles. They are to reach: TTFT within 5 % of "always", throughput and
TPOT within 2 % of "off"; a target within the interval is neither reached nor missed.
"""

from __future__ import annotations

import argparse
import math
import queue
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from triptych.config import EngineConfig, ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.engine.loop import Engine
from triptych.engine.messages import AddRequest, ItemLanded, StepOutput
from triptych.engine.overlap import Overlap
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
WAYS: tuple[Overlap, ...] = ("adaptive", "off", "always")
TARGETS: tuple[tuple[str, str, Overlap, float | None], ...] = (
    ("TTFT", "ttft", "always", 1.05),
    ("TPOT", "tpot", "off", 1.02),
    ("seconds a token", "token_s", "off", 1.02),
    ("TTFT", "ttft", "off", None),
)
"""Of adaptive: what, its name in ``Figures``, against whom, and the most that the ratio may be."""
console = Console(highlight=False)


@dataclass(frozen=True)
class Figures:
    """Of one round, or of the two of a block. Less is better."""

    ttft: float
    """Mean seconds from a request's arrival to its first token."""
    tpot: float
    """Mean seconds between two of its tokens."""
    token_s: float
    """Seconds a token, those of prompts and answers alike: the inverse of throughput."""


class Clock:
    """Seconds, without those in which the engine's thread waited for a CPU."""

    def __init__(self, engine: Engine) -> None:
        self._waited = Path(f"/proc/self/task/{engine._thread.native_id}/schedstat")

    def now(self) -> float:
        _, waited_ns, _ = self._waited.read_text("ascii").split()
        return time.perf_counter() - int(waited_ns) / 1e9


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
            outputs.put((self._clock.now(), output))

        engine = Engine(self.model, None, config, emit)
        engine.start().result()
        self._clock = Clock(engine)
        images: queue.SimpleQueue[tuple[str, int] | None] = queue.SimpleQueue()
        encoder = threading.Thread(target=self._encode, args=(engine, images))
        encoder.start()
        began = self._clock.now()
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
        took = self._clock.now() - began
        images.put(None)
        encoder.join()
        engine.close(CLOSE_S)
        names = self._arrived
        return Figures(
            statistics.fmean(self._first[n] - self._arrived[n] for n in names),
            statistics.fmean((self._last[n] - self._first[n]) / (ANSWER - 1) for n in names),
            took / tokens,
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
        self._arrived[name] = self._clock.now()
        engine.submit(
            AddRequest(name, tuple(ids), spans, Sampling(max_tokens=ANSWER, temperature=0))
        )
        for item in range(n_images):
            images.put((name, item))
        return len(ids) + ANSWER

    def _encode(self, engine: Engine, images: queue.SimpleQueue[tuple[str, int] | None]) -> None:
        rows = torch.randn(self.model.planes, ROWS, self.model.hidden_size)
        while (image := images.get()) is not None:
            until = self._clock.now() + self.encode_s
            while (left := until - self._clock.now()) > 0:
                time.sleep(left)
            engine.submit(ItemLanded(*image, rows))


def measure(model: LanguageModel, args: argparse.Namespace) -> list[dict[Overlap, Figures]]:
    """Of each block."""

    def round_of(way: Overlap) -> Figures:
        return Round(
            model, way, args.requests, args.concurrency, args.encode_ms / 1000, args.chunk_tokens
        ).run()

    for way in WAYS:  # a warm-up
        round_of(way)
    blocks = []
    for number in range(args.blocks):
        order = [WAYS[(number + place) % len(WAYS)] for place in range(len(WAYS))]
        first = {way: round_of(way) for way in order}
        second = {way: round_of(way) for way in reversed(order)}
        blocks.append({way: between(first[way], second[way]) for way in WAYS})
    return blocks


def between(a: Figures, b: Figures) -> Figures:
    """Geometric means."""
    return Figures(
        math.sqrt(a.ttft * b.ttft), math.sqrt(a.tpot * b.tpot), math.sqrt(a.token_s * b.token_s)
    )


def interval(values: list[float]) -> tuple[float, float]:
    """Where their median lies with a probability of 95 % at least: between two of ``values``."""
    ordered, n = sorted(values), len(values)
    outside = 0
    """Places at either end: so few of ``n`` coins fall on one side in 2.5 % of all cases."""
    while sum(math.comb(n, k) for k in range(outside + 1)) / 2**n <= 0.025:
        outside += 1
    return ordered[max(0, outside - 1)], ordered[n - max(1, outside)]


def show(blocks: list[dict[Overlap, Figures]]) -> None:
    table = Table("overlap", "TTFT ms", "TPOT ms", "tokens/s")
    for way in WAYS:
        found = [block[way] for block in blocks]
        table.add_row(
            way,
            f"{statistics.median(f.ttft for f in found) * 1e3:.1f}",
            f"{statistics.median(f.tpot for f in found) * 1e3:.2f}",
            f"{1 / statistics.median(f.token_s for f in found):.0f}",
        )
    console.print(table)
    for what, name, other, most in TARGETS:
        ratios = [getattr(b["adaptive"], name) / getattr(b[other], name) for b in blocks]
        low, high = interval(ratios)
        first, _, third = statistics.quantiles(ratios)
        said = f"{what}, adaptive / {other}: {statistics.median(ratios):.3f}"
        said += f"  (95 %: {low:.3f} to {high:.3f}; quartiles {first:.3f}, {third:.3f})"
        if most is not None:
            how = "reached" if high <= most else "missed" if low > most else "not decided"
            said += f"  wanted ≤ {most}: {how}"
        console.print(said, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--encode-ms", type=float, default=12.0)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    args = parser.parse_args()
    if args.blocks < 6:
        parser.error("an interval of 95 % needs six blocks at least")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = make_tiny_model(Path(folder) / "model", "qwen2_5_vl")
        model = load_language(ModelConfig(str(path), dtype="float32"))
        show(measure(model, args))


if __name__ == "__main__":
    main()
