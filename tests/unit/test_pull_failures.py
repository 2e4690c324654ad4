"""How pulls and leases end when something goes wrong: real sockets, real transports."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest

from tests.transfer_pair import LONG, NBYTES, Pair, break_reads, paired, until
from tests.transfer_rig import FAST, SECRET, Puller, Worker, hello
from triptych.errors import (
    BadMedia,
    Cancelled,
    DeadlineExceeded,
    TransferFailed,
    WorkerLost,
)
from triptych.transfer.handshake import dial
from triptych.transfer.transports.base import Read
from triptych.transfer.transports.shm import ShmLink


@pytest.mark.parametrize("before", [True, False])
async def test_a_named_failure_reaches_the_consumer(before: bool) -> None:
    async with paired() as pair:
        ref, _ = pair.embed()
        error = BadMedia("image 2: truncated", item=2)
        if before:
            pair.worker.producer.fail(ref.slot, error)
        pulling = pair.start(ref)
        if not before:
            await pair.claimed()
            pair.worker.producer.fail(ref.slot, error)
        with pytest.raises(BadMedia, match="truncated") as caught:
            await pulling
        assert caught.value.item == 2
        await until(lambda: pair.worker.idle == [ref.slot])


async def test_cancel_at_the_producer_ends_the_pull() -> None:
    async with paired() as pair:
        ref, _ = pair.embed()
        pulling = pair.start(ref)
        await pair.claimed()
        pair.worker.producer.cancel("r1")
        pair.worker.producer.cancel("r1")
        with pytest.raises(Cancelled):
            await pulling
        assert pair.worker.idle == [ref.slot]


async def test_cancelling_the_pull_releases_the_lease() -> None:
    async with paired() as pair:
        ref, _ = pair.embed()
        pulling = pair.start(ref)
        await pair.claimed()
        pulling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pulling
        await until(lambda: pair.worker.idle == [ref.slot])


async def test_cancelling_during_a_read_waits_until_nothing_is_written_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended: list[float] = []

    def slow(link: ShmLink, pieces: Sequence[Read], timeout_s: float) -> None:
        read(link, pieces, timeout_s)
        if pieces[0].nbytes == NBYTES:
            time.sleep(0.2)
            ended.append(time.monotonic())

    read = ShmLink.read
    monkeypatch.setattr(ShmLink, "read", slow)
    async with paired("shm") as pair:
        ref, piece = pair.embed()
        pair.worker.producer.ready(ref.slot, [piece], last=True)
        pulling = pair.start(ref)
        await pair.claimed()
        await asyncio.sleep(0.05)
        for _ in range(3):  # whoever is impatient
            pulling.cancel()
            await asyncio.sleep(0.01)
        with pytest.raises(asyncio.CancelledError):
            await pulling
        assert len(ended) == 1
        assert ended[0] <= time.monotonic()
        assert pair.landed == []
        await until(lambda: pair.worker.idle == [ref.slot])


async def test_a_lease_that_ends_during_the_read_is_found_by_validation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with paired("shm") as pair:
        ref, piece = pair.embed()

        def drop_and_read(link: ShmLink, pieces: Sequence[Read], timeout_s: float) -> None:
            if pieces[0].nbytes == NBYTES:
                drop = pair.worker.producer._lender.session_lost
                loop.call_soon_threadsafe(drop, pair.puller.dialled[0].session)
                time.sleep(0.05)
            read(link, pieces, timeout_s)

        loop, read = asyncio.get_running_loop(), ShmLink.read
        monkeypatch.setattr(ShmLink, "read", drop_and_read)
        pair.worker.producer.ready(ref.slot, [piece], last=True)
        with pytest.raises(TransferFailed, match="lease expired"):
            await pair.pull(ref)
        assert pair.landed == []


async def test_a_silent_consumer_loses_its_lease() -> None:
    """The channel stays open; only the holder's messages stop."""
    timeouts = replace(FAST, heartbeat=0.05, lease=0.4, transfer=0.2)
    async with paired(timeouts=timeouts) as pair:
        mute = replace(timeouts, heartbeat=100.0, silence=100.0)
        puller = Puller(timeouts=mute)
        ref, piece = pair.embed()
        pulling = asyncio.create_task(puller.consumer.pull(ref, "r1", pair.place, pair.land, LONG))
        with pytest.raises(TransferFailed, match="lease expired"):
            await pulling
        assert pair.worker.idle == [ref.slot]
        assert pair.landed == []
        await puller.close()


async def test_the_routers_lease_lives_with_its_heartbeats_and_ends_with_its_channel() -> None:
    timeouts = replace(FAST, heartbeat=0.05, lease=0.3, transfer=0.2)
    async with paired(timeouts=timeouts) as pair:
        ref, _ = pair.embed()
        await asyncio.sleep(0.7)
        assert pair.worker.producer.leases(ref.slot) == 1
        await pair.router.close()
        await until(lambda: pair.worker.idle == [ref.slot])
        with pytest.raises(TransferFailed, match="no lease of request r1"):
            await pair.pull(ref)


async def test_a_consumer_that_dies_loses_its_leases() -> None:
    async with paired() as pair:
        ref, _ = pair.embed()
        pulling = pair.start(ref)
        await pair.claimed()
        await pair.puller.dialled[0].close()
        with pytest.raises(WorkerLost):
            await pulling
        await until(lambda: pair.worker.idle == [ref.slot])


async def test_a_producer_that_dies_and_one_that_comes_back() -> None:
    puller = Puller()
    async with Worker().serve() as worker:
        router = await dial(worker.url, hello, SECRET, FAST, None, lambda *_: None, lambda *_: None)
        pair = Pair(worker, puller, router)
        ref, _ = pair.embed()
        pulling = pair.start(ref)
        await pair.claimed()
    with pytest.raises(WorkerLost):
        await pulling
    with pytest.raises(WorkerLost):
        await pair.pull(ref)
    async with Worker().serve() as again:  # as if it had come back on the old address
        with pytest.raises(WorkerLost, match="process that is gone"):
            await pair.pull(msgspec.structs.replace(ref, owner=again.url))
    await puller.close()
    await router.close()


async def test_nothing_ready_in_time() -> None:
    async with paired() as pair:
        ref, _ = pair.embed()
        with pytest.raises(DeadlineExceeded, match="waiting for pieces"):
            await pair.pull(ref, timeout_s=0.1)
        await until(lambda: pair.worker.idle == [ref.slot])


async def test_a_failed_read_tells_how_long_to_keep_away(monkeypatch: pytest.MonkeyPatch) -> None:
    break_reads(monkeypatch, 3.0)
    async with paired("shm") as pair:
        ref, piece = pair.embed()
        pair.worker.producer.ready(ref.slot, [piece], last=True)
        with pytest.raises(TransferFailed, match="stuck") as caught:
            await pair.pull(ref)
        assert caught.value.quarantine_s == 3.0
        await until(lambda: pair.worker.idle == [ref.slot])


async def test_closing_the_consumer_ends_its_pulls() -> None:
    async with paired() as pair:
        ref, _ = pair.embed()
        pulling = pair.start(ref)
        await pair.claimed()
        await pair.puller.close()
        with pytest.raises(WorkerLost):
            await pulling
        await until(lambda: pair.worker.idle == [ref.slot])
        with pytest.raises(WorkerLost, match="closed"):
            await pair.pull(ref)
