"""Several extents at once: all or nothing, in order, nobody passed for ever, nothing lost."""

from __future__ import annotations

import asyncio
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.errors import Overloaded, PromptTooLong
from triptych.transfer.pool import BYPASS, Extent, Pool

PAGE = 4096
LONG = 5.0
GROUP = st.lists(st.integers(1, 8), min_size=1, max_size=6)


def pool(pages: int) -> Pool:
    return Pool(3 * PAGE, pages * PAGE)


def now(subject: Pool, *pages: int) -> list[Extent]:
    extents = subject.try_allocate_all([n * PAGE for n in pages])
    assert extents is not None
    return extents


def later(subject: Pool, *pages: int, timeout_s: float = LONG) -> asyncio.Task[list[Extent]]:
    return asyncio.create_task(subject.allocate_all([n * PAGE for n in pages], timeout_s))


def first_fit(taken: list[bool], sizes: list[int]) -> bool:
    """The slow version: page by page, the largest first."""
    taken = list(taken)
    for size in sorted(sizes, reverse=True):
        for start in range(len(taken) - size + 1):
            if not any(taken[start : start + size]):
                taken[start : start + size] = [True] * size
                break
        else:
            return False
    return True


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 24), st.lists(st.tuples(GROUP, st.integers(0, 9)), max_size=40))
def test_all_or_nothing(pages: int, steps: list[tuple[list[int], int]]) -> None:
    """Against a list of which page is taken."""
    subject = pool(pages)
    taken = [False] * pages
    held: list[list[Extent]] = []

    def mark(extents: list[Extent], value: bool) -> None:
        for extent in extents:
            start = (extent.offset - 3 * PAGE) // PAGE
            for page in range(start, start + extent.nbytes // PAGE):
                assert taken[page] is not value, "one page in two hands"
                taken[page] = value

    for sizes, number in steps:
        if number % 3 and held:
            extents = held.pop(number % len(held))
            mark(extents, False)
            subject.free_all(extents)
        elif sum(sizes) > pages:
            with pytest.raises(PromptTooLong):
                subject.try_allocate_all([n * PAGE for n in sizes])
        else:
            found = subject.try_allocate_all([n * PAGE for n in sizes])
            assert (found is not None) == first_fit(taken, sizes)
            if found is not None:
                assert [extent.nbytes for extent in found] == [n * PAGE for n in sizes]
                assert all(a.generation < b.generation for a, b in pairwise(found))
                mark(found, True)
                held.append(found)
        assert subject.free_nbytes == taken.count(False) * PAGE
    for extents in held:
        subject.free_all(extents)
    assert now(subject, pages)[0].nbytes == pages * PAGE


async def test_who_waits_holds_nothing() -> None:
    subject = pool(4)
    (block,) = now(subject, 3)
    waiting = later(subject, 1, 1)
    await asyncio.sleep(0)
    assert subject.free_nbytes == PAGE
    other = now(subject, 1)  # that page is anybody's
    subject.free(block)
    assert len(await waiting) == 2
    assert subject.used_nbytes == 3 * PAGE
    subject.free_all([*waiting.result(), *other])
    assert subject.free_nbytes == subject.nbytes


async def test_requests_that_need_half_each_do_not_wait_for_each_other() -> None:
    """Collected piece by piece, two such would each hold what the other waits for."""
    subject = pool(8)

    async def user() -> None:
        for _ in range(20):
            extents = await subject.allocate_all([PAGE] * 5, LONG)
            await asyncio.sleep(0)
            subject.free_all(extents)

    async with asyncio.timeout(LONG):
        await asyncio.gather(*(user() for _ in range(10)))
    assert subject.free_nbytes == subject.nbytes


async def test_a_group_is_passed_only_so_often_in_any_place_of_the_line() -> None:
    subject = pool(4)
    (block,) = now(subject, 2)
    line = [later(subject, 2, 2), later(subject, 3), later(subject, 1, 2)]
    await asyncio.sleep(0)
    passed = 0
    while (small := subject.try_allocate_all([PAGE])) is not None:
        subject.free_all(small)
        passed += 1
    assert passed == BYPASS
    assert [waiter.passed for waiter in subject._waiters] == [BYPASS] * 3
    late = later(subject, 1)
    await asyncio.sleep(0)
    assert not late.done()
    line[0].cancel()  # who comes next has been passed as often, and may not be passed again
    await asyncio.sleep(0.01)
    assert not late.done()
    subject.free(block)
    for waiting in line[1:]:
        subject.free_all(await waiting)
    subject.free_all(await late)
    assert subject.free_nbytes == subject.nbytes


async def test_a_large_group_among_many_small_requests() -> None:
    subject = pool(16)
    draw = random.Random(1)
    served = False

    async def small() -> None:
        while not served:
            extent = await subject.allocate(draw.choice([1, 2]) * PAGE, LONG)
            await asyncio.sleep(draw.random() / 1000)
            subject.free(extent)

    users = [asyncio.create_task(small()) for _ in range(20)]
    await asyncio.sleep(0.02)
    before, ahead = subject._generation, len(subject._waiters)
    large = await subject.allocate_all([4 * PAGE] * 4, LONG)
    served = True
    assert 0 < large[0].generation - before - 1 <= ahead + BYPASS
    subject.free_all(large)
    await asyncio.gather(*users)
    assert subject.free_nbytes == subject.nbytes


async def test_no_room_in_time_and_no_room_ever() -> None:
    subject = pool(4)
    (block,) = now(subject, 3)
    with pytest.raises(Overloaded, match=r"8192 bytes in a pool of 16384 within 0.05 s"):
        await later(subject, 1, 1, timeout_s=0.05)
    assert subject.free_nbytes == PAGE
    subject.free(block)
    for sizes in ([5 * PAGE], [2 * PAGE, 2 * PAGE, 1], [1] * 5):
        with pytest.raises(PromptTooLong, match="the pool has 16384"):
            subject.try_allocate_all(sizes)
        with pytest.raises(PromptTooLong):
            await subject.allocate_all(sizes, LONG)
    assert subject.free_nbytes == subject.nbytes


@pytest.mark.parametrize("granted", [True, False])
async def test_a_waiter_that_is_cancelled_holds_nothing(granted: bool) -> None:
    subject = pool(4)
    blocks = now(subject, 1, 3)
    waiting = later(subject, 1, 2)
    next_one = later(subject, 1, 1, 1, 1)
    await asyncio.sleep(0)
    if granted:  # and cancelled before it runs
        subject.free_all(blocks)
        assert subject.free_nbytes == PAGE
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    subject.free_all(blocks)
    assert len(await next_one) == 4
    subject.free_all(await next_one)
    assert subject.free_nbytes == subject.nbytes


async def test_groups_of_all_sizes_come_and_go_and_are_cancelled() -> None:
    subject = pool(16)
    draw = random.Random(2)
    served = 0

    async def user() -> None:
        nonlocal served
        for _ in range(20):
            sizes = [draw.choice([1, 2, 5]) * PAGE for _ in range(draw.choice([1, 2, 3]))]
            try:
                async with asyncio.timeout(draw.choice([0.001, LONG])):
                    extents = await subject.allocate_all(sizes, LONG)
            except TimeoutError:
                continue
            assert [extent.nbytes for extent in extents] == sizes
            await asyncio.sleep(draw.random() / 1000)
            subject.free_all(extents)
            served += 1

    await asyncio.gather(*(user() for _ in range(20)))
    assert served > 100
    assert subject.free_nbytes == subject.nbytes
    assert not subject._waiters
