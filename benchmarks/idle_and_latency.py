"""What the roles cost: an idle role's CPU, resident memory, /encode's answer, the router's CPU.

Starts E/P/D with two encoders on this machine and the demo's small model, and prints one table.
Figures depend on the machine and on what else it does; they are not tested.

    python benchmarks/idle_and_latency.py [--requests 40] [--idle-s 10] [--together 4]
"""

from __future__ import annotations

import asyncio
import os
import platform
import random
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import psutil
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from triptych.config import EngineConfig, ModelConfig, ServeConfig, secrets_from_environment
from triptych.demo.client import Answer, Client, request_body
from triptych.demo.pictures import Picture
from triptych.demo.tiny import make_tiny_model
from triptych.launch import Children

MIB = 1 << 20
IMAGES = 4
"""Of one request."""


@dataclass(frozen=True)
class Options:
    requests: int = 40
    """Requests that are measured."""
    idle_s: float = 10.0
    """How long nothing is asked."""
    together: int = 4
    """Requests in progress at once, so that /encode is answered while forwards run."""


def new_pictures(source: random.Random) -> list[Picture]:
    """Images that no cache knows."""
    pictures = []
    for index in range(IMAGES):
        small = Image.frombytes("RGB", (16, 16), source.randbytes(16 * 16 * 3))
        file = BytesIO()
        small.resize((320, 240)).save(file, "jpeg")
        pictures.append(Picture(f"{index}.jpeg", "image/jpeg", file.getvalue()))
    return pictures


def cpu_seconds(processes: Sequence[psutil.Process]) -> list[float]:
    return [sum(process.cpu_times()[:2]) for process in processes]


async def ask_many(client: Client, options: Options) -> list[Answer]:
    model, source = await client.model(), random.Random(0)
    free = asyncio.Semaphore(options.together)

    async def one() -> Answer:
        async with free:
            body = request_body(model, "What is this?", new_pictures(source), 8)
            return await client.ask(body, lambda _: None)

    return list(await asyncio.gather(*(one() for _ in range(options.requests))))


async def encode_calls_ms(client: Client, answers: Sequence[Answer]) -> list[float]:
    """From the router's question to the encoder's answer: digests, then bytes, upload included."""
    calls = []
    for answer in answers:
        for span in await client.timeline(answer.request_id):
            if span["name"] == "encode_call":
                calls.append(span["end_ms"] - span["start_ms"])
    return calls


async def measure(options: Options, folder: Path, console: Console) -> None:
    config = ServeConfig(
        ModelConfig(str(make_tiny_model(folder / "model"))),
        encoders=2,
        port=0,
        engine=EngineConfig(threads=1),
        log_folder=folder / "logs",
    )
    secrets = secrets_from_environment(make=True)
    async with Children(config, secrets, console.print) as children:
        await children.ready()
        names = [child.name for child in children.running]
        processes = [psutil.Process(child.process.pid) for child in children.running]
        async with Client(children.url, secrets.api_key) as client:
            await ask_many(client, Options(requests=4))  # the first requests warm everything up
            before = cpu_seconds(processes)
            await asyncio.sleep(options.idle_s)
            idle = [b - a for a, b in zip(before, cpu_seconds(processes), strict=True)]
            before = cpu_seconds(processes)
            answers = await ask_many(client, options)
            busy = [b - a for a, b in zip(before, cpu_seconds(processes), strict=True)]
            calls = await encode_calls_ms(client, answers)
        table = Table("role", "idle, % of a core", "resident, MiB", "CPU, ms a request")
        for name, process, rest, work in zip(names, processes, idle, busy, strict=True):
            table.add_row(
                name,
                f"{100 * rest / options.idle_s:.1f}",
                f"{process.memory_info().rss / MIB:.0f}",
                f"{1e3 * work / len(answers):.1f}",
            )
    console.print(table)
    percentiles = statistics.quantiles(calls, n=20)
    console.print(
        f"/encode call as the router sees it, digests and upload and answer, "
        f"{options.together} requests at once: p50 {percentiles[9]:.1f} ms, "
        f"p95 {percentiles[18]:.1f} ms ({len(calls)} calls)"
    )
    console.print(
        f"{options.requests} requests of {IMAGES} new images; {platform.machine()}, "
        f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}"
    )


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    folder = Path(tempfile.mkdtemp(prefix="triptych-bench-"))
    try:
        asyncio.run(measure(options, folder, Console(highlight=False)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
