"""CPU time of the router process, with workers that compute nothing.

    python benchmarks/router.py [--repeats 3] [--json FILE]

A real router process serves E/P/D: two encoders, prefill and decode are stubs in this process that
speak the real protocol. Three loads, each repeated; the table has the median and the range.

* *Text*: streamed requests of 120 words, 8 tokens of answer, 8 at a time.
* *Streams*: 256 answers at once, one token of each in every step; only steps in which all of them
  run are counted, so that requests' beginnings and ends are not in it.
* *Images*: eight unique 1920 x 1080 JPEG files a request as data URIs, 2040 rows each, 8 tokens of
  answer, one request at a time.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import secrets
import statistics
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
import uvloop
from PIL import Image
from rich.console import Console
from rich.table import Table
from router_peers import Client, RouterProcess, router

from triptych.config import ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.router.prompt import Prompter

STREAMS = 256
RAMP = 16
"""Streams that begin together."""
STEP_S = 0.04
"""Of the streams: what a decode step of a large batch takes."""
STEPS = 60
"""Counted, of the streams."""
WARM_STEPS = 20
LONG = 2000
"""Tokens of answers that are still running when enough steps have been counted."""
TEXT_REQUESTS = 200
IMAGE_REQUESTS = 10
IMAGES = 8
SAID = " the red circle is left of the blue square and both are large"
console = Console(highlight=False, width=120)


@dataclass(frozen=True)
class Config:
    repeats: int = 3
    json: Path | None = None
    """File for the figures."""


@dataclass(frozen=True)
class Figure:
    name: str
    unit: str
    wanted: float
    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)


# ------------------------------------------------------------------ bodies


def draw(seed: int) -> bytes:
    """A 1920 x 1080 JPEG of about half a megabyte."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 255, (68, 120, 3)).astype(np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((1920, 1080), Image.Resampling.BICUBIC))
    grain = random.integers(-6, 7, pixels.shape)
    image = Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def unique(photo: bytes) -> str:
    """A data URI of a file that no router has seen: bytes behind a JPEG's end mean nothing."""
    return f"data:image/jpeg;base64,{base64.b64encode(photo + secrets.token_bytes(16)).decode()}"


def requests_with_images(photos: list[bytes]) -> list[bytes]:
    return [
        body("what differs?", 8, [unique(photo) for photo in photos]) for _ in range(IMAGE_REQUESTS)
    ]


def body(text: str, max_tokens: int, photos: list[str] | None = None) -> bytes:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in photos or ()]
    message = {"role": "user", "content": [*images, {"type": "text", "text": text}]}
    options = {"stream": True, "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
    return json.dumps({"model": "tiny", "messages": [message], **options}).encode()


# ------------------------------------------------------------------ loads


async def closed_loop(at: RouterProcess, bodies: list[bytes], at_once: int) -> float:
    """CPU seconds of the router a request."""
    left: Iterator[bytes] = iter(bodies)

    async def one() -> None:
        client = await Client.connect(at.port)
        for each in left:
            await client.ask(each)
        client.close()

    before = at.cpu_s()
    await asyncio.gather(*(one() for _ in range(at_once)))
    return (at.cpu_s() - before) / len(bodies)


async def text(at: RouterProcess, prepared: Iterator[list[bytes]]) -> float:
    """Milliseconds a request."""
    words = " ".join(["what is left of the circle"] * 20)
    bodies = [body(f"{number} {words}", 8) for number in range(TEXT_REQUESTS)]
    return 1e3 * await closed_loop(at, bodies, 8)


async def images(at: RouterProcess, prepared: Iterator[list[bytes]]) -> float:
    """Milliseconds a request."""
    return 1e3 * await closed_loop(at, next(prepared), 1)


async def streams(at: RouterProcess, prepared: Iterator[list[bytes]]) -> float:
    """Microseconds a token while all streams run."""
    decode = at.worker("decode")
    usual, decode.step_s = decode.step_s, STEP_S
    clients = [await Client.connect(at.port) for _ in range(STREAMS)]
    asking: list[asyncio.Task[bytes]] = []

    async def until(wanted: Callable[[], bool]) -> None:
        while not wanted():
            for task in asking:
                if task.done():
                    task.result()
                    raise RuntimeError("an answer ended early")
            await asyncio.sleep(STEP_S / 4)

    for start in range(0, STREAMS, RAMP):  # not all at once: their beginnings are not measured
        asking += (
            asyncio.create_task(client.ask(body("go on", LONG)))
            for client in clients[start : start + RAMP]
        )
        await until(lambda: decode.n_running >= len(asking))  # noqa: B023

    async def full_steps(n: int) -> None:
        begin = len(decode.steps)
        await until(lambda: len(decode.steps) >= begin + n and decode.steps[-n:] == [STREAMS] * n)

    await full_steps(WARM_STEPS)
    first, before = len(decode.steps), at.cpu_s()
    await full_steps(STEPS)
    spent, n_steps = at.cpu_s() - before, len(decode.steps) - first
    for client in clients:
        client.close()
    await asyncio.gather(*asking, return_exceptions=True)
    while decode.n_running:  # noqa: ASYNC110
        await asyncio.sleep(STEP_S)
    decode.step_s = usual
    return 1e6 * spent / (n_steps * STREAMS)


Load = Callable[[RouterProcess, Iterator[list[bytes]]], Awaitable[float]]
LOADS: list[tuple[str, str, float, Load]] = [
    ("text-only request", "ms", 3.0, text),
    (f"token at {STREAMS} streams", "µs", 50.0, streams),
    (f"request with {IMAGES} 1080p data URIs", "ms", 40.0, images),
]


async def measure(config: Config, model: Path) -> list[Figure]:
    # Before the router starts: workers in this process must not be silent for long.
    photos = [draw(seed) for seed in range(IMAGES)]
    prepared = iter([requests_with_images(photos) for _ in range(config.repeats)])
    said = Prompter(ModelConfig(str(model)))._encode(SAID * 200)
    figures = []
    async with router(model, said) as at:
        await closed_loop(at, [body("warm up", 8)] * 100, 8)
        for name, unit, wanted, load in LOADS:
            values: list[float] = []
            for _ in range(config.repeats):
                values.append(await load(at, prepared))
                console.print(f"{name}: {values[-1]:.2f} {unit}")
            figures.append(Figure(name, unit, wanted, values))
    return figures


def show(figures: list[Figure]) -> None:
    table = Table("router's CPU time a", "wanted", "median", "range")
    for figure in figures:
        low, high = min(figure.values), max(figure.values)
        table.add_row(
            figure.name,
            f"≤ {figure.wanted:g} {figure.unit}",
            f"{figure.median:.2f} {figure.unit}",
            f"{low:.2f} to {high:.2f}",
        )
    console.print(table)


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "tiny")
        figures = uvloop.run(measure(config, model))
    show(figures)
    if config.json is not None:
        found: list[dict[str, Any]] = [vars(figure) for figure in figures]
        config.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
