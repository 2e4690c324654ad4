"""The whole transfer plane between two processes, once per transport."""

from __future__ import annotations

import asyncio
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import msgspec
import pytest

from tests.transfer_process import content
from tests.transfer_rig import FAST, Puller
from triptych.config import TransportName
from triptych.errors import TransferFailed, WorkerLost
from triptych.refs import EmbeddingRef
from triptych.transfer.consumer import Pulled
from triptych.transfer.transports.base import Read

NBYTES = (5 << 20) + 17
LONG = 60.0
TRANSPORTS: list[TransportName] = ["auto", "shm", "http", "mooncake"]


@asynccontextmanager
async def producer(transport: TransportName) -> AsyncIterator[tuple[Process, EmbeddingRef]]:
    command = (sys.executable, "-m", "tests.transfer_process", transport, str(NBYTES))
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    assert process.stdout is not None and process.stdin is not None
    try:
        async with asyncio.timeout(LONG):
            line = await process.stdout.readline()
        yield process, msgspec.json.decode(line, type=EmbeddingRef)
    finally:
        process.stdin.close()
        if process.returncode is None:
            process.kill()
        await process.wait()


def start(puller: Puller, ref: EmbeddingRef) -> asyncio.Task[Pulled]:
    return asyncio.create_task(
        puller.consumer.pull(ref, "r1", lambda first, pieces: [puller.area], lambda *_: None, LONG)
    )


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_bytes_come_over_from_another_process(transport: TransportName) -> None:
    async with producer(transport) as (process, ref):
        assert process.stdin is not None and process.stdout is not None
        puller = Puller(NBYTES, transport)
        pulling = start(puller, ref)
        process.stdin.write(b"go\n")
        pulled = await pulling
        assert pulled.transport == ("shm" if transport == "auto" else transport)
        assert bytes(puller.region.view(puller.area, NBYTES)) == content(NBYTES)
        process.stdin.write(b"end\n")
        async with asyncio.timeout(LONG):
            assert await process.stdout.readline() == b"1\n"  # the lease was released
        await puller.close()


async def test_a_killed_producer_is_noticed_at_once() -> None:
    async with producer("shm") as (process, ref):
        puller = Puller(NBYTES, "shm")
        pulling = start(puller, ref)
        while not puller.dialled:  # noqa: ASYNC110 (set by the consumer's task)
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        async with asyncio.timeout(1.0):
            with pytest.raises(WorkerLost):
                await pulling
        await puller.close()


async def test_a_stopped_producer_is_noticed_by_its_silence() -> None:
    async with producer("shm") as (process, ref):
        puller = Puller(NBYTES, "shm", timeouts=replace(FAST, silence=0.5))
        pulling = start(puller, ref)
        while not puller.dialled:  # noqa: ASYNC110 (set by the consumer's task)
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        process.send_signal(signal.SIGSTOP)
        try:
            async with asyncio.timeout(5.0):
                with pytest.raises(WorkerLost, match="silent"):
                    await pulling
        finally:
            process.send_signal(signal.SIGCONT)
        await puller.close()


async def test_a_read_from_a_dead_engine_fails_by_name() -> None:
    """Mooncake has no connection that breaks: the read itself must find out, and in time."""
    async with producer("mooncake") as (process, ref):
        puller = Puller(NBYTES, "mooncake")
        pulling = start(puller, ref)
        while not puller.consumer._by_session:  # noqa: ASYNC110 (set by the consumer's task)
            await asyncio.sleep(0.01)
        (known,) = puller.consumer._by_session.values()
        process.kill()
        with pytest.raises(WorkerLost):
            await pulling
        with pytest.raises(TransferFailed):
            await asyncio.to_thread(known.link.read, [Read(8192, puller.area, NBYTES)], 10.0)
        await puller.close()
