"""An embedding that is read at once and proven afterwards: real sockets, real transports."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest

from tests.transfer_pair import LONG, NBYTES, Pair, break_reads, paired, until
from triptych import wire
from triptych.config import TransportName
from triptych.errors import BadMedia, TransferFailed
from triptych.refs import EmbeddingRef
from triptych.transfer.pull import Copy
from triptych.transfer.transports.base import Read
from triptych.transfer.transports.shm import ShmLink


async def fetch(pair: Pair, ref: EmbeddingRef) -> Copy:
    return await pair.puller.consumer.fetch(ref, "r1", pair.puller.area, LONG)


@pytest.mark.parametrize("transport", ["shm", "http", "mooncake"])
async def test_it_is_there_before_it_is_proven(transport: TransportName) -> None:
    async with paired(transport) as pair:
        ref, piece = pair.embed()
        fetching = asyncio.create_task(fetch(pair, ref))
        await pair.claimed()
        pair.worker.producer.ready(ref.slot, [piece], last=True)
        copy = await fetching
        pair.check(piece)
        assert copy.transport == transport and copy.read_s > 0 and pair.worker.idle == []
        await copy.validate()
        await copy.validate()
        await until(lambda: pair.worker.idle == [ref.slot])


@pytest.mark.parametrize("when", ["during", "after"])
async def test_a_lease_that_ends_too_soon_is_found_out(
    monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """After the read is too soon as well: nobody can say that it was not during."""
    async with paired("shm") as pair:
        ref, piece = pair.embed()

        def drop_and_read(link: ShmLink, pieces: Sequence[Read], timeout_s: float) -> None:
            if pieces[0].nbytes == NBYTES and when == "during":
                loop.call_soon_threadsafe(drop, pair.puller.dialled[0].session)
                time.sleep(0.05)
            read(link, pieces, timeout_s)

        loop, read = asyncio.get_running_loop(), ShmLink.read
        drop = pair.worker.producer._lender.session_lost
        monkeypatch.setattr(ShmLink, "read", drop_and_read)
        pair.worker.producer.ready(ref.slot, [piece], last=True)
        copy = await fetch(pair, ref)
        if when == "after":
            drop(pair.puller.dialled[0].session)
        with pytest.raises(TransferFailed, match="lease expired"):
            await copy.validate()


async def test_one_that_is_given_back_is_not_proven() -> None:
    async with paired() as pair:
        ref, piece = pair.embed()
        pair.worker.producer.ready(ref.slot, [piece], last=True)
        copy = await fetch(pair, ref)
        copy.release()
        with pytest.raises(TransferFailed, match="before it was proven"):
            await copy.validate()
        await until(lambda: pair.worker.idle == [ref.slot])


async def test_a_failure_and_an_end_before_it_is_ready() -> None:
    async with paired() as pair:
        ref, _ = pair.embed()
        fetching = asyncio.create_task(fetch(pair, ref))
        await pair.claimed()
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        await until(lambda: pair.worker.idle == [ref.slot])
        other, _ = pair.embed()
        pair.worker.producer.fail(other.slot, BadMedia("image 1: truncated", item=0))
        with pytest.raises(BadMedia, match="truncated"):
            await fetch(pair, other)
        await until(lambda: pair.worker.idle == [ref.slot, other.slot])


async def test_a_read_that_may_go_on_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    break_reads(monkeypatch, 3.0)
    async with paired("shm") as pair:
        ref, piece = pair.embed()
        pair.worker.producer.ready(ref.slot, [piece], last=True)
        with pytest.raises(TransferFailed, match="stuck") as caught:
            await fetch(pair, ref)
        assert caught.value.quarantine_s == 3.0
        await until(lambda: pair.worker.idle == [ref.slot])


async def test_several_pieces_are_not_an_embedding() -> None:
    async with paired() as pair:
        ref, _ = pair.embed()
        fetching = asyncio.create_task(fetch(pair, ref))
        await pair.claimed()
        pair.worker.channels[-1].send(wire.Ready(1, 0, (wire.Piece(8192, NBYTES),), False))
        with pytest.raises(TransferFailed, match="pieces"):
            await fetching
