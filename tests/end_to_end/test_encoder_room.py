"""The encoder's service: cancelling, and room in its pool."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from tests.end_to_end.encoder_bench import (
    ROUTER,
    WAIT_S,
    Bench,
    bench,
    picture,
    png,
    request,
    until,
)
from triptych.config import Timeouts
from triptych.demo.tiny import make_tiny_model
from triptych.encoder.service import EncoderService
from triptych.errors import Cancelled, NoRoom, Overloaded, PromptTooLong


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("qwen3_vl"), "qwen3_vl")


# ------------------------------------------------------------------ cancelling


async def test_cancel_drops_what_waits_and_frees_what_runs(folder: Path) -> None:
    files = [png(picture(seed)) for seed in range(6)]
    async with bench(folder, media_threads=1) as subject:
        subject.gate.open.clear()
        await subject.encode(request("r0", files[:1]))
        await until(subject.gate.entered.is_set)
        await subject.encode(request("r1", files[1:]))
        free = subject.service.pool.free_nbytes
        subject.service.cancel("r1")
        assert subject.service.pool.free_nbytes > free
        subject.service.cancel("r0")
        assert len(subject.service._embeddings) == 1  # its forward may still write there
        subject.gate.open.set()
        await until(lambda: not subject.service._embeddings)
        assert subject.gate.batches == [1]
        assert subject.service.pool.free_nbytes == subject.service.pool.nbytes
        assert subject.told == {} and subject.reports == []


async def test_cancel_of_one_leaves_the_work_to_the_others(folder: Path) -> None:
    file = png(picture(1))
    async with bench(folder) as subject:
        subject.gate.open.clear()
        await subject.encode(request("r0", [file]))
        (shared,) = await subject.encode(request("r1", [file]))
        subject.service.cancel("r0")
        subject.service.cancel("r0")
        assert shared.ref is not None
        claim = subject.consumer.claim(shared.ref, "r1")
        subject.gate.open.set()
        await subject.consumer.read(claim)
        assert set(subject.told) == {"r1"}


async def test_a_forward_that_was_cancelled_may_be_wanted_again(folder: Path) -> None:
    file = png(picture(1))
    async with bench(folder) as subject:
        subject.gate.open.clear()
        await subject.encode(request("r0", [file]))
        await until(subject.gate.entered.is_set)
        subject.service.cancel("r0")
        (again,) = await subject.encode(request("r1", [file]))
        subject.gate.open.set()
        assert again.ref is not None
        await subject.consumer.read(subject.consumer.claim(again.ref, "r1"))
        assert subject.gate.batches == [1]


async def test_a_cancel_may_overtake_its_request(folder: Path) -> None:
    async with bench(folder) as subject:
        subject.service.cancel("r0")
        with pytest.raises(Cancelled):
            await subject.encode(request("r0", [png(picture(1))]))


async def test_a_lost_router_frees_what_it_asked_for(folder: Path) -> None:
    async with bench(folder) as subject:
        subject.gate.open.clear()
        await subject.encode(request("r0", [png(picture(seed)) for seed in range(3)]))
        subject.service.producer.session_lost(ROUTER)
        subject.gate.open.set()
        await until(lambda: not subject.service._embeddings)


# ------------------------------------------------------------------ room


def large(seed: int) -> bytes:
    """196 rows of 4 planes of 64 float32: 196 KiB, so five of them fill the pool of 1 MiB."""
    return png(picture(seed, 448, 448))


async def test_the_pool_is_the_cache_and_evicts_the_oldest(folder: Path) -> None:
    async with bench(folder) as subject:
        for seed in range(8):
            await subject.embeddings(f"r{seed}", [large(seed)])
        cached = [
            not (await subject.encode(request(f"s{seed}", [large(seed)], data=False)))[0].miss
            for seed in range(8)
        ]
        assert cached == [False] * 3 + [True] * 5
        for seed in range(8):
            subject.service.cancel(f"s{seed}")


async def test_bytes_of_the_pool_by_what_they_are_doing(folder: Path) -> None:
    async with bench(folder) as subject:

        def shown() -> dict[str, float]:
            return {
                sample.labels["state"]: sample.value
                for family in REGISTRY.collect()
                for sample in family.samples
                if sample.name == "triptych_pool_bytes" and sample.labels["pool"] == "embeddings"
            }

        size, whole = 196 * 4 * 64 * 4, subject.service.pool.nbytes
        nothing = dict.fromkeys(("pinned", "leased", "cached", "quarantined"), 0)
        assert shown() == {"free": whole, **nothing}
        subject.gate.open.clear()
        (item,) = await subject.encode(request("r0", [large(0)]))
        assert shown() == {"free": whole - size, **nothing, "pinned": size}  # being filled
        subject.gate.open.set()
        await until(lambda: shown()["leased"] == size)
        assert shown() == {"free": whole - size, **nothing, "leased": size}
        subject.service.cancel("r0")
        assert shown() == {"free": whole - size, **nothing, "cached": size}


async def test_a_full_pool_makes_requests_wait_in_order(folder: Path) -> None:
    async with bench(folder) as subject:
        refs = await subject.encode(request("r0", [large(seed) for seed in range(5)]))
        order: list[str] = []

        async def ask(name: str, seeds: range) -> None:
            await subject.encode(request(name, [large(seed) for seed in seeds]))
            order.append(name)
            subject.service.cancel(name)

        waiting = [
            asyncio.create_task(ask("r1", range(10, 14))),
            asyncio.create_task(ask("r2", range(20, 24))),
        ]
        await asyncio.sleep(0.05)
        assert order == []
        for item in refs:
            assert item.ref is not None
            await subject.consumer.read(subject.consumer.claim(item.ref, "r0"))
        await asyncio.gather(*waiting)
        assert order == ["r1", "r2"]


async def test_requests_that_need_half_the_pool_each_do_not_lock_up(folder: Path) -> None:
    async with bench(folder) as subject:

        async def ask(name: str, seeds: range) -> None:
            await subject.embeddings(name, [large(seed) for seed in seeds])

        await asyncio.wait_for(
            asyncio.gather(*(ask(f"r{n}", range(10 * n, 10 * n + 3)) for n in range(6))), WAIT_S
        )


async def test_no_room_in_time_is_overloaded_and_holds_nothing(folder: Path) -> None:
    async with bench(folder, timeouts=Timeouts(pool=0.1)) as subject:
        await subject.encode(request("r0", [large(seed) for seed in range(4)]))
        small = png(picture(1))
        # What is left of the time when the images' headers have been read.
        with pytest.raises(Overloaded, match=r"within 0(\.\d+)? s"):
            await subject.encode(request("r1", [small, large(10), large(11)]))
        assert len(subject.service._embeddings) == 4
        (answer,) = await subject.encode(request("r2", [large(12)]))
        assert answer.ref is not None
        for name in ("r0", "r2"):
            subject.service.cancel(name)


def counted_anew(service: EncoderService) -> dict[str, int]:
    """Of the pool's bytes those that are leased and those that are cached, slot by slot."""
    found = {"leased": 0, "cached": 0}
    for slot, embedding in service._embeddings.items():
        if embedding.cached:
            found["leased" if service.producer.leases(slot) else "cached"] += (
                embedding.extent.nbytes
            )
    return found


async def test_bytes_leased_and_cached_are_counted_as_they_change(folder: Path) -> None:
    async with bench(folder, pool_mib=2) as subject:
        service = subject.service
        seen: set[tuple[int, int]] = set()

        def check() -> None:
            usage = service.pool.usage()
            expected = counted_anew(service)
            assert {state: usage[state] for state in expected} == expected
            kept = {extent.offset for extent in service._kept.evictable()}
            assert kept == {
                e.extent.offset
                for slot, e in service._embeddings.items()
                if e.cached and not service.producer.leases(slot)
            }
            seen.add((usage["leased"] > 0, usage["cached"] > 0))

        check()
        for turn in range(8):  # more than the pool holds
            files = [large(seed) for seed in (turn, turn + 1, turn + 2)]
            await subject.encode(request(f"kept-{turn}", files[:1]))
            await until(lambda: all(e.cached for e in service._embeddings.values()))
            check()
            await subject.embeddings(
                f"read-{turn}", files
            )  # hits, one leased already, and new ones
            check()
            service.cancel(f"kept-{turn}")
            check()
        assert seen == {(False, False), (True, False), (False, True), (True, True)}
        assert not service._coming


async def test_who_found_no_room_is_told_when_there_will_be_some(folder: Path) -> None:
    """At the pace at which room was given out while it waited."""
    async with bench(folder, timeouts=Timeouts(pool=2.0)) as subject:
        (held, *_) = await subject.encode(request("r0", [large(seed) for seed in range(4)]))
        assert held.ref is not None
        one = held.ref.nbytes
        with pytest.raises(Overloaded) as refused:
            await subject.encode(request("r1", [large(seed) for seed in range(10, 14)]))
        # Nothing was given out for as long as it waited.
        assert refused.value.retry_after_s == pytest.approx(2.0, abs=0.1)
        waiting = asyncio.create_task(
            subject.encode(request("r2", [large(seed) for seed in range(10, 14)]))
        )
        await asyncio.sleep(0.2)
        await subject.encode(request("r3", [png(picture(1))]))  # fits beside the four, and passes
        small = subject.service._embeddings[max(subject.service._embeddings)].extent.nbytes
        with pytest.raises(Overloaded) as refused:
            await waiting
        assert 4 * one / small > 3
        expected = min(60.0, 2.0 * 4 * one / small)
        assert refused.value.retry_after_s == pytest.approx(expected, rel=0.05)
        for name in ("r0", "r3"):
            subject.service.cancel(name)


async def test_who_is_not_to_wait_is_told_at_once_and_takes_nothing(folder: Path) -> None:
    async with bench(folder) as subject:
        await subject.embeddings("r0", [large(0)])
        await subject.encode(request("r1", [large(seed) for seed in range(1, 4)]))
        wanted = [large(0), large(10), large(11)]
        with pytest.raises(NoRoom):
            await subject.encode(request("r2", wanted, wait=False))
        leased = [subject.service.producer.leases(slot) for slot in subject.service._embeddings]
        assert sum(leased) == 3
        subject.service.cancel("r1")
        await subject.encode(request("r3", wanted, wait=False))
        subject.service.cancel("r3")


async def test_those_who_wait_hold_nothing_that_another_waits_for(folder: Path) -> None:
    """Both find two of their images in the pool and need two more: there are five slots."""
    async with bench(folder) as subject:
        for seed in range(4):
            await subject.embeddings(f"fill{seed}", [large(seed)])
        held = await subject.encode(request("r0", [large(seed) for seed in range(4)]))
        assert all(item.cached for item in held)

        async def ask(name: str, seeds: list[int]) -> None:
            files = [large(seed) for seed in seeds]
            await subject.embeddings(name, files)

        waiting = [
            asyncio.create_task(ask("r1", [0, 1, 10, 11])),
            asyncio.create_task(ask("r2", [2, 3, 12, 13])),
        ]
        await asyncio.sleep(0.05)
        subject.service.cancel("r0")
        await asyncio.wait_for(asyncio.gather(*waiting), WAIT_S)
        assert subject.service.pool.usage()["leased"] == 0


async def test_what_was_cached_may_be_evicted_while_one_waits(folder: Path) -> None:
    async with bench(folder) as subject:
        await subject.embeddings("fill", [large(0)])
        await subject.encode(request("r0", [large(seed) for seed in range(1, 5)]))
        waiting = asyncio.create_task(subject.encode(request("r1", [large(0), large(8), large(9)])))
        await asyncio.sleep(0.02)
        await subject.encode(request("r2", [large(5)], wait=False))  # in place of image 0
        subject.service.cancel("r0")
        answers = await asyncio.wait_for(waiting, WAIT_S)
        assert [(item.miss, item.cached) for item in answers] == [(False, False)] * 3
        for name in ("r1", "r2"):
            subject.service.cancel(name)


async def test_cancel_ends_the_wait_for_room(folder: Path) -> None:
    async with bench(folder) as subject:
        await subject.encode(request("r0", [large(seed) for seed in range(5)]))
        waiting = asyncio.create_task(subject.encode(request("r1", [large(10), large(11)])))
        await asyncio.sleep(0.02)
        subject.service.cancel("r1")
        with pytest.raises(Cancelled):
            await waiting
        disconnected = asyncio.create_task(subject.encode(request("r2", [large(10)])))
        await asyncio.sleep(0.02)
        disconnected.cancel()
        with pytest.raises(asyncio.CancelledError):
            await disconnected
        subject.service.cancel("r0")


async def test_what_never_fits_is_refused_at_once(folder: Path) -> None:
    async with bench(folder) as subject:
        with pytest.raises(PromptTooLong, match="the pool has 1048576"):
            await subject.encode(request("r1", [large(seed) for seed in range(6)]))
        assert subject.service._embeddings == {}


async def test_a_long_queue_is_overloaded(folder: Path) -> None:
    async with bench(folder, queue_patches=100, media_threads=1) as subject:
        subject.gate.open.clear()
        await subject.encode(request("r0", [png(picture(0))]))
        await until(subject.gate.entered.is_set)
        await subject.encode(request("r1", [large(1)]))  # an empty queue takes anything
        with pytest.raises(Overloaded, match="100 vision patches"):
            await subject.encode(request("r2", [png(picture(2))]))
        (hit,) = await subject.encode(request("r3", [png(picture(0))]))  # needs no queue
        assert hit.ref is not None
        subject.service.cancel("r0")
        subject.service.cancel("r1")
        subject.service.cancel("r3")


async def test_a_worker_stops_in_the_middle_of_its_work(folder: Path) -> None:
    subject = Bench(folder, media_threads=1, pool_mib=2)
    await subject.service.start()
    subject.gate.open.clear()
    await subject.encode(request("r0", [png(picture(0))]))
    await until(subject.gate.entered.is_set)
    await subject.encode(request("r1", [large(seed) for seed in range(5)]))
    threading.Timer(0.05, subject.gate.open.set).start()
    await asyncio.wait_for(subject.service.stop(), WAIT_S)
    await asyncio.sleep(0.05)  # what the threads still sent to the loop is handled in peace
    assert subject.gate.batches == [1]
