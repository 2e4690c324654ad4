"""Where the time of a vision forward goes on a GPU: kernels, launches, or threads beside it.

    python benchmarks/encoder_forward.py [--device cuda:0] [--seconds 1.5] [--json FILE]

A tower of Qwen2.5-VL-7B's shape with random weights, bfloat16, in this process: captured, compiled
and as it is; one after the other and with pauses as long as an image takes to come; alone and
beside threads that decode and preprocess. Each row is printed when it is known, what decides first:
``all`` is what a request waits for, ``host`` until the forward is launched, ``GPU`` from its first
kernel to its last. Where ``host`` is as long as ``all`` launches decide, where ``GPU`` is, kernels.
"""

from __future__ import annotations

import cProfile
import hashlib
import json
import pstats
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from encoder_plain import FULL_HD, SMALL, Pictures, make_model, rate
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from triptych.config import MediaLimits, ModelConfig
from triptych.encoder.preparation import Preparer, RawImage
from triptych.encoder.runner import warm_up_batches
from triptych.media.image import decode, read_header
from triptych.media.processor import Processor
from triptych.models.captured import CudaGraphs
from triptych.models.loading import load_encoder
from triptych.models.stream import Stream
from triptych.models.vision import Item, VisionModel
from triptych.models.vision_attention import ends_of, packed_attention

PAUSE_S = 0.035
BATCH_PATCHES = 8192
MEDIA_THREADS = 16


@dataclass(frozen=True)
class Config:
    device: str = "cuda:0"
    seconds: float = 1.5
    """Of each row."""
    json: Path | None = None


@dataclass
class Rows:
    found: list[tuple[str, float, float, float]] = field(default_factory=list)

    def add(self, name: str, times: Sequence[tuple[float, float, float]]) -> None:
        """``times``: seconds of (all, host, GPU)."""
        everything, host, device = (
            1000 * float(np.median(part)) for part in zip(*times, strict=True)
        )
        self.found.append((name, everything, host, device))
        print(
            f"{name:66} all {everything:6.1f}  host {host:6.1f}  GPU {device:6.1f} ms"
            f"  ({len(times)} forwards)",
            flush=True,
        )


def note(text: str) -> None:
    print(f"# {text}", flush=True)


# ------------------------------------------------------------------ one tower


class Tower:
    """A vision model on its stream, as the engine thread has it."""

    def __init__(self, config: ModelConfig, processor: Processor) -> None:
        self.model: VisionModel = load_encoder(config)
        self.stream = Stream(self.model.device)
        self.processor = processor

    def warm_up(self, batches: Sequence[Sequence[Item]]) -> float:
        """Seconds of the first forwards."""
        began = time.perf_counter()
        for batch in batches:
            with self.stream.entered():
                self.model.encode(batch)
                self.stream.mark()()
        return time.perf_counter() - began

    def times(self, batch: Sequence[Item], seconds: float, pause: float = 0.0) -> list[
        tuple[float, float, float]
    ]:  # fmt: skip
        """(all, host, GPU) of every forward; four do not count."""
        found = []
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(found) < 8:
            time.sleep(pause)
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began = time.perf_counter()
            with self.stream.entered():
                first.record()
                self.model.encode(batch)
                last.record()
                launched = time.perf_counter()
                self.stream.mark()()
            ended = time.perf_counter()
            found.append((ended - began, launched - began, first.elapsed_time(last) / 1000))
        return found[4:]


@contextmanager
def busy(preparer: Preparer, files: Callable[[], bytes]) -> Iterator[None]:
    """As many images in preparation as keep every thread busy."""
    stop = threading.Event()
    room = threading.Semaphore(preparer.at_once)

    def feed() -> None:
        while not stop.is_set():
            if not room.acquire(timeout=0.1):
                continue
            data = files()
            digest = hashlib.sha256(data).hexdigest()
            item = RawImage(data, digest, read_header(data, MediaLimits()), 1)
            preparer.submit(item).add_done_callback(lambda _: room.release())

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        time.sleep(0.3)
        yield
    finally:
        stop.set()
        feeder.join()


# ------------------------------------------------------------------ the rows


def measure(config: Config, folder: Path) -> list[tuple[str, float, float, float]]:
    rows, seconds = Rows(), config.seconds
    settings = make_model(None, config.device, "auto", folder / "model")
    processor = Processor(settings)
    large_files, small_files = Pictures(FULL_HD), Pictures(SMALL)
    tower = Tower(settings, processor)

    def item(pictures: Pictures) -> Item:
        image = decode(pictures.new()[0], MediaLimits())
        return tower.model.stage(processor.preprocess(image, 1))

    large, small = item(large_files), item(small_files)
    preparer = Preparer(processor, MediaLimits(), tower.model, MEDIA_THREADS)
    note(f"{tower.model.patches(large)} and {tower.model.patches(small)} patches an image")
    tower.model.compile(folder / "compiled")
    batches = warm_up_batches(tower.model, processor, BATCH_PATCHES)
    note(f"compiled in {tower.warm_up(batches):.1f} s")
    for name, batch in (("1080p", [large]), ("448 px", [small])):
        rows.add(f"{name}, compiled, with pauses", tower.times(batch, seconds, PAUSE_S))
        rows.add(f"{name}, compiled, one after the other", tower.times(batch, seconds))
    with busy(preparer, lambda: large_files.new()[0]):
        rows.add("1080p, compiled, media threads busy", tower.times([large], seconds, PAUSE_S))
    host_profile(tower, [small])
    tower.model.capture(CudaGraphs(tower.model.device))
    for name, batch in (("1080p", [large]), ("448 px", [small]), ("8 x 448 px", [small] * 8)):
        rows.add(f"{name}, captured, with pauses", tower.times(batch, seconds, PAUSE_S))
    rows.add("1080p, captured, one after the other", tower.times([large], seconds))
    with busy(preparer, lambda: large_files.new()[0]):
        rows.add("1080p, captured, media threads busy", tower.times([large], seconds, PAUSE_S))
    kernels(tower.model.patches(large), tower.model.device)
    plain = Tower(settings, processor)
    rows.add("1080p, as it is, with pauses", plain.times([large], seconds, PAUSE_S))
    torch._dynamo.reset()
    plain.model.compile(folder / "compiled-small-first")
    note(f"compiled for a small image first in {plain.warm_up(batches[::-1]):.1f} s")
    rows.add("1080p, compiled for a small one first", plain.times([large], seconds, PAUSE_S))
    preparer.close()
    return rows.found


def host_profile(tower: Tower, batch: Sequence[Item]) -> None:
    """What Python does while it launches."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(5):
        with tower.stream.entered():
            tower.model.encode(batch)
            tower.stream.mark()()
    profile.disable()
    note("host time of five compiled forwards, 448 px:")
    pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(12)


def kernels(patches: int, device: torch.device) -> None:
    """The parts that no compiler changes: attention over one 1080p image, and a matrix product."""

    def timed(name: str, work: Callable[[], object], flops: float) -> None:
        try:
            a_second = rate(lambda: (work(), torch.cuda.synchronize())[1], 0.3)
        except RuntimeError as error:
            note(f"{name}: {error}")
        else:
            note(f"{name}: {1000 / a_second:.2f} ms, {flops * a_second / 1e12:.0f} TFLOP/s")

    for head_dim in (80, 128):
        shape = (patches, 16, head_dim)
        q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
        flops = 4.0 * patches**2 * 16 * head_dim
        ends = ends_of([patches]).to(device)
        timed(
            f"variable-length kernel, heads of {head_dim}",
            lambda: packed_attention(q, k, v, ends, patches, q.shape[-1] ** -0.5),  # noqa: B023
            flops,
        )
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            with sdpa_kernel(backend):
                timed(
                    f"{backend.name}, heads of {head_dim}",
                    lambda: scaled_dot_product_attention(
                        *(x.transpose(0, 1)[None] for x in (q, k, v))  # noqa: B023
                    ),
                    flops,
                )
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    timed("8192³ product", lambda: a @ a, 2.0 * 8192**3)


def main(config: Config) -> int:
    note(f"torch {torch.__version__}, {torch.cuda.get_device_name(config.device)}")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        rows = measure(config, Path(folder))
    if config.json is not None:
        config.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
