"""Pulls over ``shm`` as GPU memory takes it, with host memory in its place: the whole plane."""

from __future__ import annotations

import asyncio
import secrets
import threading
from pathlib import Path

import pytest
import torch

from tests import transfer_rig
from tests.transfer_pair import LONG, NBYTES, paired, piece_range, until
from triptych import wire
from triptych.config import TransportName
from triptych.errors import TransferFailed
from triptych.transfer.region import PAGE, Region
from triptych.transfer.transports import staging
from triptych.transfer.transports.base import Transport
from triptych.transfer.transports.http import HttpTransport
from triptych.transfer.transports.shm_device import StagedTransport
from triptych.transfer.transports.staging import HostCopier, Layout


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(name: TransportName, region: Region, *, url: str, host: str) -> dict[str, Transport]:
        staged = StagedTransport(region, Layout(2, 2 * PAGE + 1))
        return {"shm": staged, "http": HttpTransport(region, url)}

    monkeypatch.setattr(transfer_rig, "open_transports", opened)


def mapped() -> bool:
    return "triptych-staging" in Path("/proc/self/maps").read_text(encoding="ascii")


async def test_an_embedding_arrives() -> None:
    async with paired() as pair:
        ref, piece = pair.embed()
        pair.worker.producer.ready(ref.slot, [piece], last=True)
        pulled = await pair.pull(ref)
        assert (pulled.transport, pulled.nbytes) == ("shm", NBYTES)
        pair.check(piece)
    await until(lambda: not mapped())


async def test_kv_arrives_chunk_by_chunk() -> None:
    async with paired() as pair:
        producer, region = pair.worker.producer, pair.worker.region
        ref = producer.lend_kv(70, 16, 2 * PAGE, holder=pair.holder, request_id="r1")
        pieces = [wire.Piece(region.carve(2 * PAGE), 2 * PAGE) for _ in range(5)]
        pieces.reverse()
        for piece in pieces:
            region.view(*piece_range(piece))[:] = secrets.token_bytes(2 * PAGE)
        producer.ready(ref.slot, pieces[:2], last=False)
        pulling = pair.start(ref)
        await until(lambda: len(pair.landed) == 1)
        producer.ready(ref.slot, pieces[2:], last=True)
        assert (await pulling).transport == "shm"
        for index, piece in enumerate(pieces):
            pair.check(piece, index)
    await until(lambda: not mapped())


async def test_a_read_that_waits_ends_with_its_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives back what it had locked, long before the read's own timeout."""
    gate, held = threading.Event(), threading.Event()
    gate.set()

    class Held(HostCopier):
        def start(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> staging.Copies:
            if not gate.is_set():
                held.set()
                assert gate.wait(LONG)
            return super().start(targets, sources)

    monkeypatch.setattr(staging, "open_copier", lambda device: Held())
    async with paired() as pair:
        first, piece = pair.embed("r0")
        pair.worker.producer.ready(first.slot, [piece], last=True)
        await pair.pull(first, "r0")
        ref, piece = pair.embed()
        pair.worker.producer.ready(ref.slot, [piece], last=True)
        gate.clear()
        pulling = pair.start(ref)
        assert await asyncio.to_thread(held.wait, LONG)
        await pair.puller.dialled[0].close()
        async with asyncio.timeout(5.0):
            with pytest.raises(TransferFailed, match="lost"):
                await pulling
        gate.set()
        await until(lambda: not mapped())


@pytest.mark.parametrize("side", [0, 1])
async def test_without_page_locked_memory_bytes_go_over_http(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []

    class Limited(HostCopier):
        def lock(self, address: int, nbytes: int) -> None:
            opened.append(address)
            if len(opened) == side + 1:
                raise RuntimeError("out of memory (2)")

    monkeypatch.setattr(staging, "open_copier", lambda device: Limited())
    async with paired() as pair:
        ref, piece = pair.embed()
        pair.worker.producer.ready(ref.slot, [piece], last=True)
        assert (await pair.pull(ref)).transport == "http"
        pair.check(piece)
