"""What the encoder does beside a plain loop over the same model, and how long its answers take.

    python benchmarks/encoder.py [--device cuda] [--model FOLDER] [--brief] [--json FILE]

One encoder process is asked over its real sockets; the plain loop is Transformers' own, one image
a forward, on the same device in the same run: once its forwards alone, once with reading the JPEG
and preprocessing, which the encoder's figures always include. Without a model: on a CPU the small
random one, on a GPU a tower of Qwen2.5-VL-7B's shape with random weights, in bfloat16.

With ``--json`` the figures are written there as well.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
import transformers
import tyro
from encoder_peer import Encoder, log_tail, running, secrets
from encoder_plain import FULL_HD, SMALL, Pictures, Plain, make_model, rate
from rich.console import Console
from rich.table import Table

from triptych.config import Dtype, EncoderConfig, NetworkConfig
from triptych.errors import TriptychError

TURNS, FEW_TURNS = 5, 3
"""Of the encoder and of the plain loop, so that other load on the machine hits both."""
PROBE = Path(__file__).with_name("encoder_probe.py")


@dataclass(frozen=True)
class Config:
    model: Path | None = None
    """Folder of a model with weights."""
    device: str = "cpu"
    dtype: Dtype = "auto"
    seconds: float = 6.0
    """Of each closed loop."""
    threads: int = 1
    """CPU threads of the model's operations, in the encoder and in the plain loop."""
    media_threads: int = 0
    """As the encoder's option."""
    compile: bool = True
    """As the encoder's option."""
    brief: bool = False
    """Only the figures of which something was wanted, but for fairness, and fewer turns: on a GPU
    two and a half minutes, with ``--seconds 4``."""
    json: Path | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"


@dataclass
class Figures:
    """Rows of the report: name → value, with what was wanted."""

    rows: list[tuple[str, float, str, str]] = field(default_factory=list)

    def add(self, name: str, value: float, unit: str, wanted: str = "") -> None:
        self.rows.append((name, value, unit, wanted))
        console.print(f"  {name}: {value:.3g} {unit}" + (f"  (wanted {wanted})" if wanted else ""))


console = Console(highlight=False, width=150)


# ------------------------------------------------------------------ loads


async def loops(at_once: int, seconds: float, call: Callable[[], Awaitable[float]]) -> list[float]:
    """What ``call`` returned in ``at_once`` closed loops. A fifth of the time does not count."""
    began = time.perf_counter()
    counted: list[float] = []

    async def loop() -> None:
        while time.perf_counter() - began < 1.2 * seconds:
            found = await call()
            if time.perf_counter() - began > 0.2 * seconds:
                counted.append(found)

    await asyncio.gather(*(loop() for _ in range(at_once)))
    return counted


async def throughput(encoder: Encoder, pictures: Pictures, at_once: int, seconds: float) -> float:
    """Images a second in closed loops of one-image requests."""
    ends: list[float] = []

    async def call() -> float:
        await encoder.request(pictures.new())
        ends.append(time.perf_counter())
        return ends[-1]

    await loops(at_once, seconds, call)
    counted = [end for end in ends if end - ends[0] > 0.2 * (ends[-1] - ends[0])]
    return (len(counted) - 1) / (counted[-1] - counted[0])


def quantile(counts: dict[float, float], q: float) -> float:
    """Seconds, interpolated within the bucket as Prometheus does."""
    bounds = sorted(counts)
    rank, low, below = q * counts[bounds[-1]], 0.0, 0.0
    for bound in bounds:
        if counts[bound] >= rank:
            return low + (bound - low) * (rank - below) / max(1.0, counts[bound] - below)
        low, below = bound, counts[bound]
    return low


def p(values: list[float], q: float) -> float:
    """Quantile in milliseconds."""
    return 1000 * float(np.quantile(values, q))


# ------------------------------------------------------------------ the figures


@dataclass
class Measurement:
    config: Config
    encoder: Encoder
    plain: Plain
    figures: Figures
    small: Pictures
    large: Pictures

    async def run(self) -> None:
        # Batches of the sizes to come, so that on a GPU they are captured before anything counts.
        for pictures in (self.small, self.large):
            for at_once in (1, 2, 32, 8) if self.config.on_gpu else (2,):
                await loops(at_once, 1.0, lambda: self.encoder.request(pictures.new()))  # noqa: B023
        await self.forwards()
        await self.against_plain()
        await self.under_load()
        await self.hits()
        if not self.config.brief:
            await self.fairness()

    async def forwards(self) -> None:
        """One image at a time: how long its forward takes, and from its request to ready."""
        for name, pictures in (("448 px", self.small), ("1080p", self.large)):
            self.encoder.spans.clear()
            seconds = await loops(
                1,
                self.config.seconds / 2,
                lambda: self.encoder.request(pictures.new()),  # noqa: B023
            )
            await asyncio.sleep(0.1)  # the last spans are on their way
            wanted = "≤ 45" if name == "1080p" and self.config.on_gpu else ""
            forward = p(self.encoder.durations("encode"), 0.5)
            self.figures.add(f"forward of one {name} image, p50", forward, "ms", wanted)
            for step in ("decode", "preprocess"):
                took = p(self.encoder.durations(step), 0.5)
                self.figures.add(f"{step} of one {name} image, p50", took, "ms")
            self.figures.add(
                f"request to ready, one {name} image alone, p50", p(seconds, 0.5), "ms"
            )

    async def against_plain(self) -> None:
        """Images a second beside the plain loop's, in turns. One at a time nothing overlaps, so
        there only the loop that reads and preprocesses is a fair one."""
        gpu = self.config.on_gpu
        targets: list[tuple[str, Pictures, int, str, str]] = [
            ("448 px", self.small, 1, "", "≥ 1"),
            ("448 px", self.small, 8, "" if gpu else "> 1", "> 1"),
        ]
        if gpu:
            if self.config.brief:
                targets.clear()
            targets.append(("448 px", self.small, 32, "≥ 3", "≥ 3"))
            targets.append(("1080p", self.large, 8, "≥ 1.5", "≥ 1.5"))
        n_turns = FEW_TURNS if self.config.brief else TURNS
        for name, pictures, at_once, *wanted in targets:
            turns = [await self._turn(pictures, at_once, n_turns) for _ in range(n_turns)]
            label = f"{name}, {at_once} at a time"
            self.figures.add(label, float(np.median([turn[0] for turn in turns])), "images/s")
            loops_of = ("forwards alone", "reading, preprocessing, forward")
            for which, (what, target) in enumerate(zip(loops_of, wanted, strict=True), 1):
                ratio = float(np.median([turn[0] / turn[which] for turn in turns]))
                plain = float(np.median([turn[which] for turn in turns]))
                what = f"{label} / plain loop of {what} ({plain:.1f} images/s)"
                self.figures.add(what, ratio, "x", target)

    async def _turn(
        self, pictures: Pictures, at_once: int, n_turns: int
    ) -> tuple[float, float, float]:
        """Images a second: ours, the plain loop's forwards alone, the whole plain loop's."""
        seconds = self.config.seconds / n_turns
        alone, everything = await asyncio.to_thread(self.plain.rates, pictures, seconds / 2)
        return await throughput(self.encoder, pictures, at_once, seconds), alone, everything

    async def under_load(self) -> None:
        """How long answers take while forwards run."""
        before = await self.encoder.buckets("triptych_rpc_seconds", path="/encode")
        for path in ("/health", "/metrics"):
            load = asyncio.create_task(
                loops(
                    32 if self.config.on_gpu else 8,
                    self.config.seconds,
                    lambda: self.encoder.request(self.small.new()),
                )
            )
            await asyncio.sleep(0.2 * self.config.seconds)
            found = await self._probe(path, 0.8 * self.config.seconds)
            await load
            for q, wanted in ((0.5, ""), (0.99, "≤ 10")):
                took = p(found["took"], q)
                self.figures.add(f"{path} under load, p{q * 100:.0f}", took, "ms", wanted)
            self.figures.add(
                "a thread that only sleeps wakes late meanwhile, p99", p(found["late"], 0.99), "ms"
            )
        after = await self.encoder.buckets("triptych_rpc_seconds", path="/encode")
        counts = {bound: after[bound] - before.get(bound, 0.0) for bound in after}
        for q, wanted in ((0.5, "≤ 5"), (0.99, "≤ 20")):
            took = 1000 * quantile(counts, q)
            self.figures.add(
                f"/encode after its last byte, under load, p{q * 100:.0f}", took, "ms", wanted
            )

    async def _probe(self, path: str, seconds: float) -> dict[str, list[float]]:
        """What ``encoder_probe.py`` prints, as a process of its own."""
        url = urlsplit(self.encoder.url)
        probe = await asyncio.create_subprocess_exec(
            *(sys.executable, "-S", "-E", str(PROBE)),
            *(str(url.hostname), str(url.port), path, str(seconds)),
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await probe.communicate()
        if probe.returncode:
            raise TriptychError(f"measuring {path} failed")
        found: dict[str, list[float]] = json.loads(output)
        return found

    async def hits(self) -> None:
        files = self.large.new(4)
        await self.encoder.request(files)
        times = [await self.encoder.request(files, send=False) for _ in range(50)]
        for q, wanted in ((0.5, "≤ 10"), (0.99, "")):
            label = f"four 1080p images from the cache, request to ready, p{q * 100:.0f}"
            self.figures.add(label, p(times, q), "ms", wanted)

    async def fairness(self) -> None:
        """One-image requests beside requests of 32 images."""
        seconds = self.config.seconds
        lone = await loops(1, seconds / 2, lambda: self.encoder.request(self.small.new()))
        self.encoder.spans.clear()
        stop = time.perf_counter() + 2 * seconds

        async def many() -> None:
            while time.perf_counter() < stop:
                await self.encoder.request(self.small.new(32))

        load = [asyncio.create_task(many()) for _ in range(4)]
        await asyncio.sleep(0.2 * seconds)
        beside = await loops(1, 1.2 * seconds, lambda: self.encoder.request(self.small.new()))
        await asyncio.gather(*load)
        batch = p(self.encoder.durations("encode"), 0.99)
        limit = 2 * p(lone, 0.5) + batch
        self.figures.add("one image alone, p50", p(lone, 0.5), "ms")
        self.figures.add("a batch's forward beside 32-image requests, p99", batch, "ms")
        self.figures.add("one image beside 32-image requests, p50", p(beside, 0.5), "ms")
        self.figures.add(
            "one image beside 32-image requests, p99", p(beside, 0.99), "ms", f"≤ {limit:.0f}"
        )


def machine(config: Config) -> Iterator[tuple[str, str]]:
    yield "torch", torch.__version__
    yield "transformers", transformers.__version__
    if config.on_gpu:
        yield "device", torch.cuda.get_device_name(config.device)
        a = torch.randn(8192, 8192, device=config.device, dtype=torch.bfloat16)
        gemm = rate(lambda: (a @ a, torch.cuda.synchronize())[1], 1.0)
        yield "bfloat16 8192³ product", f"{gemm * 2 * 8192**3 / 1e12:.0f} TFLOP/s"


async def measure(config: Config, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(config.threads)
    about = dict(machine(config))
    console.print(", ".join(f"{name} {value}" for name, value in about.items()))
    model = make_model(config.model, config.device, config.dtype, folder / "model")
    model = replace(model, compile=config.compile)
    small, large, figures = Pictures(SMALL), Pictures(FULL_HD), Figures()
    plain = Plain(model)
    encoder_config = EncoderConfig(
        model,
        NetworkConfig(transport="http"),  # nobody reads the bytes
        pool_mib=8192 if config.on_gpu else 256,
        media_threads=config.media_threads,
        threads=config.threads,
    )
    began = time.perf_counter()
    async with running(encoder_config, secrets(), folder / "encoder.log") as encoder:
        figures.add("encoder ready after", time.perf_counter() - began, "s")
        await Measurement(config, encoder, plain, figures, small, large).run()
    lines = log_tail(folder / "encoder.log").splitlines()
    about["log"] = [line for line in lines if "forward" in line or "compiled" in line]
    console.print("\n".join(about["log"]))
    return {**about, "figures": figures.rows}


def main(config: Config) -> int:
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = asyncio.run(measure(config, Path(folder)))
    except TriptychError as error:
        console.print(f"error: {error.message}")
        return 1
    table = Table("figure", "value", "unit", "wanted")
    for name, value, unit, wanted in result["figures"]:
        table.add_row(name, f"{value:.3g}", unit, wanted)
    console.print(table)
    if config.json is not None:
        config.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
