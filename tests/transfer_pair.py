"""A producer and a consumer over real sockets, on one loop."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from tests.transfer_rig import FAST, SECRET, Puller, Worker, hello
from triptych import wire
from triptych.config import Timeouts, TransportName
from triptych.errors import TransferFailed
from triptych.refs import AnyRef, EmbeddingRef
from triptych.transfer.channel import Channel
from triptych.transfer.consumer import Pulled
from triptych.transfer.handshake import dial
from triptych.transfer.region import PAGE
from triptych.transfer.transports.base import Read
from triptych.transfer.transports.shm import ShmLink

NBYTES = 3 * PAGE + 5

SHAPE = (1, 1, NBYTES)

LONG = 10.0


class Pair:
    """A worker with its router's channel, and a consumer."""

    def __init__(self, worker: Worker, puller: Puller, router: Channel) -> None:
        self.worker = worker
        self.puller = puller
        self.router = router
        self.landed: list[tuple[int, int, bytes]] = []

    @property
    def holder(self) -> str:
        return self.router.session

    def embed(self, request: str = "r1") -> tuple[EmbeddingRef, wire.Piece]:
        piece = wire.Piece(self.worker.region.carve(NBYTES), NBYTES)
        ref = self.worker.producer.lend_embedding(
            piece, "key", "uint8", SHAPE, holder=self.holder, request_id=request
        )
        self.worker.region.view(*piece_range(piece))[:] = secrets.token_bytes(NBYTES)
        return ref, piece

    def place(self, first: int, pieces: Sequence[wire.Piece]) -> list[int]:
        start = self.puller.area
        return [start + (first + index) * 4 * PAGE for index in range(len(pieces))]

    def land(self, first: int, count: int, ready: wire.Ready) -> None:
        self.landed.append((first, count, ready.note))

    async def pull(self, ref: AnyRef, request: str = "r1", timeout_s: float = LONG) -> Pulled:
        return await self.puller.consumer.pull(ref, request, self.place, self.land, timeout_s)

    def start(self, ref: AnyRef, request: str = "r1") -> asyncio.Task[Pulled]:
        return asyncio.create_task(self.pull(ref, request))

    async def claimed(self, count: int = 1) -> None:
        await until(lambda: sum(isinstance(m, wire.Claim) for m in self.worker.messages) >= count)

    def check(self, piece: wire.Piece, index: int = 0) -> None:
        source = self.worker.region.view(*piece_range(piece))
        target = self.puller.region.view(self.puller.area + index * 4 * PAGE, piece.nbytes)
        assert source == target


def break_reads(monkeypatch: pytest.MonkeyPatch, quarantine_s: float) -> None:
    """Reads of embeddings by shared memory get stuck."""
    read = ShmLink.read

    def fail(link: ShmLink, pieces: Sequence[Read], timeout_s: float) -> None:
        if pieces[0].nbytes == NBYTES:
            raise TransferFailed("stuck", quarantine_s=quarantine_s)
        read(link, pieces, timeout_s)

    monkeypatch.setattr(ShmLink, "read", fail)


def piece_range(piece: wire.Piece) -> tuple[int, int]:
    return piece.offset, piece.nbytes


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LONG):
        while not condition():  # noqa: ASYNC110 (of another thread or task)
            await asyncio.sleep(0.005)


@asynccontextmanager
async def paired(
    transport: TransportName = "auto", timeouts: Timeouts = FAST
) -> AsyncIterator[Pair]:
    async with Worker(transport=transport, timeouts=timeouts).serve() as worker:
        puller = Puller(transport=transport, timeouts=timeouts)
        router = await dial(
            worker.url, hello, SECRET, timeouts, None, lambda *_: None, lambda *_: None
        )
        try:
            yield Pair(worker, puller, router)
        finally:
            await puller.close()
            await router.close()
