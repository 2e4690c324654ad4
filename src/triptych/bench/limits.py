"""What the GPUs can do at best, and how much of their memory is taken."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

import torch

from triptych.errors import TransferFailed

PRODUCT = 8192
"""Rows and columns of the matrices."""
COPY_NBYTES = 1 << 30
MEASURE_S = 0.5
ANSWER_S = 120.0
"""The process imports torch, and opens every device."""
QUERY_S = 20.0
FREE_S = 60.0
"""Until memory of processes that have ended is free."""
FREE_MIB = 1024
"""So much more than before is as good as none."""
POLL_S = 0.5


async def best_of(devices: Sequence[str]) -> dict[str, str]:
    """By GPU: its name, a large matrix product's rate, a copy's. Measured in a process of its own,
    which takes its memory with it. Raises TransferFailed."""
    names = [name for name in dict.fromkeys(devices) if name.startswith("cuda")]
    return await asyncio.to_thread(_asked, names) if names else {}


def _asked(names: list[str]) -> dict[str, str]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(names, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(ANSWER_S):
            raise TransferFailed("the GPUs' own rates could not be measured in time")
        found: dict[str, str] = ours.recv()
    except EOFError as exc:
        raise TransferFailed("the process that measures the GPUs' own rates has ended") from exc
    finally:
        process.kill()
        process.join()
    return found


def _measure(names: list[str], pipe: Connection) -> None:
    pipe.send({name: _rates(name) for name in names})


def _rates(name: str) -> str:
    a = torch.randn(PRODUCT, PRODUCT, device=name, dtype=torch.bfloat16)
    product = 2 * PRODUCT**3 / _seconds(lambda: a @ a, name)
    source = torch.empty(COPY_NBYTES, dtype=torch.uint8, device=name)
    target = torch.empty_like(source)
    copy = 2 * COPY_NBYTES / _seconds(lambda: target.copy_(source), name)
    return (
        f"{torch.cuda.get_device_name(name)}, bfloat16 {PRODUCT}³ {product / 1e12:.0f} TFLOP/s, "
        f"copy {copy / 1e9:.0f} GB/s read and written"
    )


def _seconds(work: Callable[[], object], name: str) -> float:
    """Of one call, over ``MEASURE_S`` of them."""
    for _ in range(3):
        work()
    torch.cuda.synchronize(name)
    began, n = time.perf_counter(), 0
    while time.perf_counter() - began < MEASURE_S:
        for _ in range(4):
            work()
        torch.cuda.synchronize(name)
        n += 4
    return (time.perf_counter() - began) / n


async def used_mib() -> int:
    """Of all GPUs together, as nvidia-smi says; 0 where there is none. Raises TransferFailed."""
    command = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
    except FileNotFoundError:
        return 0
    try:
        async with asyncio.timeout(QUERY_S):
            text, _ = await process.communicate()
    except TimeoutError as exc:
        process.kill()
        raise TransferFailed("nvidia-smi does not answer") from exc
    return sum(int(line) for line in text.decode().split() if line.isdecimal())


async def until_free(before_mib: int) -> None:
    """Until no more memory is taken than ``before_mib``, by and large. Raises TransferFailed."""
    end = time.monotonic() + FREE_S
    while (now := await used_mib()) > before_mib + FREE_MIB:
        if time.monotonic() > end:
            raise TransferFailed(f"{now - before_mib} MiB of GPU memory are still taken")
        await asyncio.sleep(POLL_S)
