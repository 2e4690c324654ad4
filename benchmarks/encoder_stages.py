"""What an image costs before its forward, step by step, and which steps two threads do at once.

    python benchmarks/encoder_stages.py [--seconds 0.5] [--threads 1 2 8] [--json FILE]

On a CPU, in this process, with the media code that the encoder runs; the rows in brackets are the
ways that Pillow and Transformers would go by themselves, for comparison. Milliseconds an image: CPU
time, and the time of one thread and of several together. A step that holds Python's lock costs
several threads together as much as one, or more; one that does not costs each thread's part of it.
Other work on the machine is in all figures but the CPU time.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from encoder_plain import FULL_HD, SMALL, Pictures, make_model
from PIL import Image
from rich.console import Console
from rich.table import Table

from triptych.config import MediaLimits
from triptych.media.image import decode, read_header
from triptych.media.pixels import pixels
from triptych.media.processor import Processor
from triptych.single import SWITCH_S, keep_freed_memory

LIMITS = MediaLimits()
Step = Callable[[], object]


@dataclass(frozen=True)
class Config:
    seconds: float = 0.5
    """Of each figure."""
    threads: tuple[int, ...] = (1, 2)
    json: Path | None = None


def per_image(step: Step, threads: int, seconds: float) -> float:
    """Milliseconds an image, of so many threads together; the first of each does not count."""
    ready = threading.Barrier(threads + 1)
    counts: list[int] = []

    def work() -> None:
        step()
        ready.wait()
        until, n = time.perf_counter() + seconds, 0
        while time.perf_counter() < until:
            step()
            n += 1
        counts.append(n)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    ready.wait()
    began = time.perf_counter()
    for worker in workers:
        worker.join()
    return 1000 * (time.perf_counter() - began) / sum(counts)


def cpu(step: Step, seconds: float) -> float:
    """Milliseconds of CPU time an image, in this thread."""
    step()
    until, n, began = time.perf_counter() + seconds, 0, time.thread_time()
    while time.perf_counter() < until:
        step()
        n += 1
    return 1000 * (time.thread_time() - began) / n


def by_pillow(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image.convert("RGB")


def channels_first(packed: np.ndarray) -> torch.Tensor:  # type: ignore[type-arg]
    return torch.from_numpy(packed).permute(2, 0, 1).contiguous()


def copied(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return target.copy_(source)


def steps(data: bytes, processor: Processor) -> dict[str, Step]:
    image = decode(data, LIMITS)
    lent = pixels(image)
    packed = np.array(image)
    return {
        "hash": lambda: hashlib.sha256(data).hexdigest(),
        "header": partial(read_header, data, LIMITS),
        "decode": partial(decode, data, LIMITS),
        "(decode by Pillow's defaults)": partial(by_pillow, data),
        "pixels for a GPU: where Pillow has them": partial(pixels, image),
        "pixels for a GPU: into staging memory": partial(copied, lent, torch.empty_like(lent)),
        "(pixels by numpy)": partial(np.array, image),
        "(channels first, on the host)": partial(channels_first, packed),
        f"preprocess here ({processor.backend})": partial(processor.preprocess, image, 1),
    }


def main(config: Config) -> int:
    torch.set_num_threads(1)
    keep_freed_memory()
    sys.setswitchinterval(SWITCH_S)
    console = Console(highlight=False, width=120)
    columns = ("CPU", *(f"{n} thread{'s' * (n > 1)}" for n in config.threads))
    table = Table("image", "step, ms", *columns)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        processor = Processor(make_model(None, "cpu", "auto", Path(folder) / "model"))
    for name, size in (("448 px", SMALL), ("1080p", FULL_HD)):
        data = Pictures(size).new()[0]
        for step, work in steps(data, processor).items():
            took = [cpu(work, config.seconds)]
            took += [per_image(work, n, config.seconds) for n in config.threads]
            rows.append((name, step, took))
            table.add_row(name, step, *(f"{ms:.3f}" for ms in took))
            console.print(name, step, *(f"{ms:.3f}" for ms in took))
    console.print(table)
    if config.json is not None:
        config.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
