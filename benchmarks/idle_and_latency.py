"""What the roles of E/P/D cost on this machine: idle CPU, memory, /encode's answer, the router.

    python benchmarks/idle_and_latency.py [--model FOLDER] [--requests 60] [--concurrency 8]

Starts a topology with a small random model, measures it idle, then under a closed loop of
requests with images that are all different, so that the encoders' forwards never pause. /encode's
answer is timed by the encoders themselves, from the request's last byte (metric
``triptych_rpc_seconds``); the files are small, so every call brings their bytes. The router's CPU
is its process's own, per request.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import re
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import aiohttp
import numpy as np
import psutil
from PIL import Image
from rich.console import Console
from rich.table import Table

from triptych.config import EngineConfig, ModelConfig, ServeConfig
from triptych.credentials import secrets_from_environment
from triptych.demo.tiny import make_tiny_model
from triptych.launch import Children

IDLE_S = 10.0
IMAGES = 4
MAX_TOKENS = 8
BUCKET = re.compile(r'triptych_rpc_seconds_bucket\{le="([^"]+)",path="/encode"\} (\S+)')
console = Console(highlight=False)


def picture(seed: int) -> str:
    """A 448 px JPEG of coloured patches as a data URI; another one for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (28, 28, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((448, 448)).save(buffer, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


async def ask(client: aiohttp.ClientSession, url: str, model: str, seed: int) -> float:
    """One request with images nobody has seen. Seconds to its end."""
    images = [
        {"type": "image_url", "image_url": {"url": picture(seed * IMAGES + i)}}
        for i in range(IMAGES)
    ]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": [*images, {"type": "text", "text": "Well?"}]}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    begin = time.perf_counter()
    async with client.post(f"{url}/v1/chat/completions", json=body) as answer:
        if answer.status != 200:
            raise RuntimeError(await answer.text())
        await answer.read()
    return time.perf_counter() - begin


async def buckets(
    client: aiohttp.ClientSession, encoders: list[psutil.Process]
) -> dict[float, float]:
    """Cumulative counts of /encode calls by upper bound, all encoders together."""
    counts: dict[float, float] = defaultdict(float)
    for process in encoders:
        ports = [c.laddr.port for c in process.net_connections("tcp") if c.status == "LISTEN"]
        async with client.get(f"http://127.0.0.1:{ports[0]}/metrics") as answer:
            for bound, count in BUCKET.findall(await answer.text()):
                counts[float(bound)] += float(count)
    return counts


def quantile(counts: dict[float, float], q: float) -> float:
    """Seconds, interpolated within the bucket as Prometheus does."""
    bounds = sorted(counts)
    rank, low, below = q * counts[bounds[-1]], 0.0, 0.0
    for bound in bounds:
        if counts[bound] >= rank:
            return low + (bound - low) * (rank - below) / max(1.0, counts[bound] - below)
        low, below = bound, counts[bound]
    return low


async def load(
    client: aiohttp.ClientSession, url: str, model: str, n: int, at_once: int
) -> list[float]:
    """``n`` requests, ``at_once`` at a time. Seconds of each."""
    seeds = iter(range(1000, 1000 + n))

    async def worker() -> list[float]:
        return [await ask(client, url, model, seed) for seed in seeds]

    return [s for share in await asyncio.gather(*(worker() for _ in range(at_once))) for s in share]


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def measure(model: str, n: int, at_once: int) -> None:
    config = ServeConfig(ModelConfig(model), encoders=2, port=0, engine=EngineConfig(threads=1))
    secrets = secrets_from_environment({}, make=True)
    async with Children(config, secrets, console.print) as children:
        await children.ready()
        roles = {
            child.command.name: psutil.Process(child.process.pid) for child in children.running
        }
        encoders = [process for name, process in roles.items() if name.startswith("encoder")]
        async with aiohttp.ClientSession() as client:
            await load(client, children.url, model, 4, 2)  # warm
            before = {name: cpu_s(process) for name, process in roles.items()}
            await asyncio.sleep(IDLE_S)
            idle = {name: (cpu_s(p) - before[name]) / IDLE_S for name, p in roles.items()}
            warm = await buckets(client, encoders)
            cpu, begin = cpu_s(roles["router"]), time.perf_counter()
            seconds = await load(client, children.url, model, n, at_once)
            wall, cpu = time.perf_counter() - begin, cpu_s(roles["router"]) - cpu
            loaded = await buckets(client, encoders)
        resident = {name: process.memory_info().rss / 2**20 for name, process in roles.items()}
    table = Table("role", "idle, % of a core", "resident, MiB")
    for name in roles:
        table.add_row(name, f"{100 * idle[name]:.2f}", f"{resident[name]:.0f}")
    console.print(table)
    counts = {bound: loaded[bound] - warm.get(bound, 0.0) for bound in loaded}
    console.print(
        f"{n} requests of {IMAGES} new images, {at_once} at a time: {n / wall:.2f} requests/s, "
        f"median {1000 * float(np.median(seconds)):.0f} ms each\n"
        f"/encode answers after its last byte: p50 {1000 * quantile(counts, 0.5):.2f} ms, "
        f"p99 {1000 * quantile(counts, 0.99):.1f} ms ({counts[max(counts)]:.0f} calls)\n"
        f"router: {1000 * cpu / n:.2f} ms of CPU a request"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="local folder; by default a tiny random Qwen3-VL")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--concurrency", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or str(make_tiny_model(Path(folder) / "tiny"))
        asyncio.run(measure(model, options.requests, options.concurrency))


if __name__ == "__main__":
    main()
