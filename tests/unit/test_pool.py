from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from triptych.errors import Overloaded, PromptTooLong
from triptych.observe.metrics import export_usage
from triptych.transfer.pool import BYPASS, Extent, Pool

PAGE = 4096
LONG = 5.0


def pool(pages: int) -> Pool:
    return Pool(3 * PAGE, pages * PAGE)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 24), st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60))
def test_extents_are_disjoint_and_nothing_leaks(pages: int, steps: list[tuple[bool, int]]) -> None:
    """Against the obvious version: a list of who owns which page."""
    subject = pool(pages)
    owner: list[Extent | None] = [None] * pages
    held: list[Extent] = []
    last = 0

    def pages_of(extent: Extent) -> range:
        start = (extent.offset - 3 * PAGE) // PAGE
        return range(start, start + extent.nbytes // PAGE)

    for take, number in steps:
        if take:
            nbytes = number * PAGE - 1 if number else 0
            if max(1, number) > pages:
                with pytest.raises(PromptTooLong):
                    subject.try_allocate(nbytes)
                continue
            extent = subject.try_allocate(nbytes)
            run = "".join("." if page is None else "x" for page in owner)
            assert (extent is not None) == ("." * max(1, number) in run)
            if extent is not None:
                assert extent.nbytes >= nbytes
                assert extent.generation > last
                last = extent.generation
                assert all(owner[page] is None for page in pages_of(extent))
                for page in pages_of(extent):
                    owner[page] = extent
                held.append(extent)
        elif held:
            extent = held.pop(number % len(held))
            subject.free(extent)
            subject.free(extent)
            for page in pages_of(extent):
                owner[page] = None
        assert subject.free_nbytes == owner.count(None) * PAGE
        assert subject.used_nbytes == (pages - owner.count(None)) * PAGE
    for extent in held:
        subject.free(extent)
    whole = subject.try_allocate(pages * PAGE)
    assert whole is not None
    assert (whole.offset, whole.nbytes) == (3 * PAGE, pages * PAGE)


def test_free_of_an_old_extent_does_not_touch_the_new_tenant() -> None:
    subject = pool(1)
    old = subject.try_allocate(1)
    assert old is not None
    subject.free(old)
    new = subject.try_allocate(1)
    assert new is not None
    assert new.offset == old.offset
    subject.free(old)
    assert subject.try_allocate(1) is None
    subject.free(new)
    assert subject.free_nbytes == PAGE


async def test_waiters_are_served_in_order() -> None:
    subject = pool(4)
    whole = await subject.allocate(4 * PAGE, LONG)
    order: list[int] = []

    async def wait(number: int) -> None:
        extent = await subject.allocate(3 * PAGE, LONG)
        order.append(number)
        await asyncio.sleep(0)
        subject.free(extent)

    async with asyncio.TaskGroup() as group:
        for number in range(5):
            group.create_task(wait(number))
        await asyncio.sleep(0.01)
        assert order == []
        subject.free(whole)
    assert order == list(range(5))
    assert subject.free_nbytes == subject.nbytes


async def test_small_requests_pass_a_large_one_only_so_often() -> None:
    subject = pool(4)
    block = subject.try_allocate(2 * PAGE)
    assert block is not None
    large = asyncio.create_task(subject.allocate(4 * PAGE, LONG))
    await asyncio.sleep(0)
    for _ in range(BYPASS):
        small = subject.try_allocate(PAGE)
        assert small is not None
        subject.free(small)
    assert subject.try_allocate(PAGE) is None
    late = asyncio.create_task(subject.allocate(PAGE, LONG))
    await asyncio.sleep(0)
    assert not late.done()
    subject.free(block)
    extent = await large
    assert not late.done()
    subject.free(extent)
    subject.free(await late)
    assert subject.free_nbytes == subject.nbytes


async def test_waiting_ends_with_overloaded_and_lets_others_go_on() -> None:
    subject = pool(2)
    held = subject.try_allocate(PAGE)
    assert held is not None
    large = asyncio.create_task(subject.allocate(2 * PAGE, 0.05))
    await asyncio.sleep(0)
    for _ in range(BYPASS):
        small = subject.try_allocate(PAGE)
        assert small is not None
        subject.free(small)
    blocked = asyncio.create_task(subject.allocate(PAGE, LONG))
    with pytest.raises(Overloaded, match="within 0.05 s"):
        await large
    subject.free(await blocked)  # served because the one before it gave up
    with pytest.raises(PromptTooLong):
        await subject.allocate(3 * PAGE, LONG)


async def test_cancelled_waiter_gives_back_what_it_was_granted() -> None:
    subject = pool(1)
    held = subject.try_allocate(1)
    assert held is not None
    waiting = asyncio.create_task(subject.allocate(1, LONG))
    await asyncio.sleep(0)
    subject.free(held)  # grants to the waiter, which is cancelled before it runs
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert subject.free_nbytes == PAGE


async def test_quarantined_memory_comes_back_later() -> None:
    subject = pool(1)
    extent = subject.try_allocate(1)
    assert extent is not None
    subject.quarantine(extent, 0.05)
    assert subject.try_allocate(1) is None
    assert subject.used_nbytes == PAGE
    assert (await subject.allocate(1, LONG)).generation == extent.generation + 1


class Cached:
    """Extents of a pool that may be evicted, the oldest first."""

    def __init__(self, subject: Pool, pages: Sequence[int]) -> None:
        self.extents = [taken(subject, size) for size in pages]
        self.pinned: set[Extent] = set()
        self.subject = subject
        subject.evictable = self.evictable
        subject.on_pressure = self.evict

    def evictable(self) -> list[Extent]:
        return [extent for extent in self.extents if extent not in self.pinned]

    def evict(self, nbytes: int) -> bool:
        for extent in self.evictable():
            self.extents.remove(extent)
            self.subject.free(extent)
            return True
        return False


def taken(subject: Pool, pages: int) -> Extent:
    extent = subject.try_allocate(pages * PAGE)
    assert extent is not None
    return extent


async def test_of_what_can_be_evicted_the_first_that_are_large_enough_are_looked_at() -> None:
    """There are thousands, and a full pool looks at every request."""
    subject = pool(100)
    extents = [taken(subject, pages) for pages in (1, 2, 1, 2, *[1] * 94)]
    seen = 0

    def evictable() -> Iterator[Extent]:
        nonlocal seen
        for extent in extents:
            seen += 1
            yield extent

    def evict(nbytes: int) -> bool:
        subject.free(extents.pop(0))
        return True

    subject.evictable, subject.on_pressure = evictable, evict
    assert [extent.nbytes for extent in subject.try_allocate_all([2 * PAGE, PAGE]) or ()] == [
        2 * PAGE,
        PAGE,
    ]
    assert seen == 4
    # Only side by side they are large enough: all are looked at, and as few as will do are freed.
    taken(subject, 50)
    assert seen > 90 and len(extents) >= 40


async def test_pressure_evicts_for_the_one_who_asks() -> None:
    subject = pool(4)
    cache = Cached(subject, [1, 1, 1, 1])
    extent = taken(subject, 3)
    assert len(cache.extents) == 1
    waiting = asyncio.create_task(subject.allocate(4 * PAGE, LONG))
    await asyncio.sleep(0)
    assert len(cache.extents) == 1  # would not be enough
    subject.free(extent)
    subject.free(await waiting)
    assert not cache.extents


async def test_eviction_in_vain_does_not_happen() -> None:
    """Enough bytes, but not side by side: what is pinned lies between."""
    subject = pool(6)
    cache = Cached(subject, [1, 2, 1, 2])
    cache.pinned.add(cache.extents[2])
    assert subject.try_allocate(4 * PAGE) is None
    assert subject.try_allocate_all([3 * PAGE, 3 * PAGE]) is None
    assert len(cache.extents) == 4
    assert subject.try_allocate_all([2 * PAGE, 3 * PAGE]) is not None
    assert cache.extents == list(cache.pinned)


async def test_serve_tries_waiters_again_when_more_can_be_evicted() -> None:
    subject = pool(1)
    cache = Cached(subject, [1])
    cache.pinned.update(cache.extents)
    waiting = asyncio.create_task(subject.allocate(1, LONG))
    await asyncio.sleep(0)
    cache.pinned.clear()
    subject.serve()
    assert (await waiting).generation == 2


async def test_many_tasks_leave_the_pool_as_it_was() -> None:
    subject = pool(16)
    draw = random.Random(0)
    served = 0

    async def user() -> None:
        nonlocal served
        for _ in range(20):
            nbytes = draw.choice([1, 2, 3, 16]) * PAGE
            try:
                extent = await asyncio.wait_for(
                    subject.allocate(nbytes, LONG), draw.choice([0.001, LONG])
                )
            except TimeoutError:
                continue
            await asyncio.sleep(draw.random() / 1000)
            subject.free(extent)
            served += 1

    await asyncio.gather(*(user() for _ in range(20)))
    assert served > 100
    assert subject.free_nbytes == subject.nbytes


async def test_nobody_frees_what_is_in_quarantine_before_its_time() -> None:
    subject = pool(2)
    extent = subject.try_allocate(PAGE)
    assert extent is not None
    subject.quarantine(extent, 0.05)
    subject.quarantine(extent, 0.2)  # the longer one counts
    subject.quarantine(extent, 0.01)
    start = asyncio.get_running_loop().time()
    subject.free(extent)
    assert (subject.quarantined_nbytes, subject.free_nbytes) == (PAGE, PAGE)
    whole = await subject.allocate(2 * PAGE, LONG)
    assert asyncio.get_running_loop().time() - start >= 0.2
    assert subject.quarantined_nbytes == 0
    subject.free(extent)  # of the tenant before
    assert subject.free_nbytes == 0
    subject.quarantine(extent, 0.01)
    assert subject.quarantined_nbytes == 0
    subject.free(whole)
    assert subject.free_nbytes == 2 * PAGE


def exported(name: str) -> dict[str, float | None]:
    sample = "triptych_pool_bytes"
    return {
        state: REGISTRY.get_sample_value(sample, {"pool": name, "state": state})
        for state in ("free", "pinned", "leased", "cached", "quarantined")
    }


async def test_bytes_by_state_are_metrics() -> None:
    subject = pool(10)
    export_usage("a test's", subject)
    extents = [taken(subject, pages) for pages in (1, 2, 3, 1)]
    subject.quarantine(extents[0], 0.01)
    subject.full = lambda: (extents[2].nbytes, extents[1].nbytes)
    expected = {"free": 3, "pinned": 1, "leased": 3, "cached": 2, "quarantined": 1}
    assert exported("a test's") == {state: n * PAGE for state, n in expected.items()}
    assert sum(subject.usage().values()) == subject.nbytes
    subject.full = lambda: (0, 0)
    taken(subject, 3)
    await subject.allocate(PAGE, LONG)  # when the quarantine is over
    assert exported("a test's")["pinned"] == 10 * PAGE
    del subject  # metrics do not keep a pool alive
    gc.collect()
    assert set(exported("a test's").values()) == {None}
