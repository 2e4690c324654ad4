"""Pages of one area of a region: contiguous extents, given out in order of arrival.

A request asks for all its extents at once and gets all of them or none, so nobody holds a part
while it waits for the rest. Who asks first is served first. Later requests that fit may pass one
that waits, ``BYPASS`` of them at most; then everyone waits until it has its memory. One decision at
a time, on the loop's thread.

Memory that a transfer may still touch is in quarantine: nothing gives it back before its time.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from triptych.errors import Overloaded, PromptTooLong

BYPASS = 16
"""How many later requests may pass one that waits."""


@dataclass(frozen=True)
class Extent:
    """Contiguous bytes of the region. ``generation`` grows with every allocation of the pool."""

    offset: int
    nbytes: int
    generation: int


_Placed: TypeAlias = tuple[list[int], list[tuple[int, int]]]
"""Offsets, and the holes that are left: (offset, nbytes), sorted."""


@dataclass
class _Waiter:
    sizes: list[int]
    granted: asyncio.Future[list[Extent]]
    passed: int = 0
    """By later ones. Who passes a waiter passes all before it: nobody's is above the first's."""


class Pool:
    """``nbytes`` of a region from ``offset``, in pages. Used from one event loop's thread.

    ``evictable()``: extents that their owner could free at once. When a request does not fit, but
    would without them, ``on_pressure(nbytes)`` is called until it fits: each time it frees one of
    them, and returns False if there is none. When they would not be enough, none is freed.
    ``full()``: bytes of extents that are complete: lent to somebody, and evictable.
    """

    def __init__(
        self,
        offset: int,
        nbytes: int,
        page: int = 4096,
        *,
        evictable: Callable[[], Iterable[Extent]] = tuple,
        full: Callable[[], tuple[int, int]] = lambda: (0, 0),
        on_pressure: Callable[[int], bool] | None = None,
    ) -> None:
        self.nbytes = nbytes // page * page
        self.free_nbytes = self.nbytes
        """Bytes that are neither in use nor in quarantine (perhaps not contiguous)."""
        self.evictable = evictable
        self.full = full
        self.on_pressure = on_pressure
        self._page = page
        self._free: list[tuple[int, int]] = [(offset, self.nbytes)] if self.nbytes else []
        """(offset, nbytes), sorted, never adjacent."""
        self.quarantined_nbytes = 0
        self._taken: dict[int, Extent] = {}
        self._quarantined: dict[int, float] = {}
        """Until when (loop time), by offset; those are taken as well."""
        self._waiters: deque[_Waiter] = deque()
        self._generation = 0
        self._serving = False

    @property
    def used_nbytes(self) -> int:
        """Bytes in use or in quarantine."""
        return self.nbytes - self.free_nbytes

    @property
    def is_waited_for(self) -> bool:
        """Does anybody wait for memory?"""
        return bool(self._waiters)

    def try_allocate(self, nbytes: int) -> Extent | None:
        """A group of one: see ``try_allocate_all``."""
        extents = self.try_allocate_all([nbytes])
        return None if extents is None else extents[0]

    def try_allocate_all(self, sizes: Sequence[int]) -> list[Extent] | None:
        """An extent of at least that many bytes (whole pages) for each size, in their order, or
        None when they cannot all be had now.

        Raises PromptTooLong when they never could.
        """
        pages = self._pages(sizes)
        if self._waiters and self._waiters[0].passed >= BYPASS:
            return None
        extents = self._take(pages)
        if extents is not None:
            for waiter in self._waiters:
                waiter.passed += 1
        return extents

    async def allocate(self, nbytes: int, timeout_s: float) -> Extent:
        """A group of one: see ``allocate_all``."""
        return (await self.allocate_all([nbytes], timeout_s))[0]

    async def allocate_all(self, sizes: Sequence[int], timeout_s: float) -> list[Extent]:
        """Like ``try_allocate_all``, but waits its turn; holds nothing while it waits, or when
        it is cancelled. Raises Overloaded after ``timeout_s``."""
        extents = self.try_allocate_all(sizes)
        if extents is not None:
            return extents
        waiter = _Waiter(self._pages(sizes), asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            await asyncio.wait({waiter.granted}, timeout=timeout_s)
            if waiter.granted.done():
                return waiter.granted.result()
        except asyncio.CancelledError:
            if waiter.granted.done():
                self.free_all(waiter.granted.result())
            raise
        finally:
            if not waiter.granted.done():
                self._waiters.remove(waiter)
                self.serve()
        raise Overloaded(
            f"no room for {sum(sizes)} bytes in a pool of {self.nbytes} within "
            f"{round(timeout_s, 2):g} s"
        )

    def free_all(self, extents: Iterable[Extent]) -> None:
        """Give back what was allocated together, or a part of it."""
        for extent in extents:
            self.free(extent)

    def free(self, extent: Extent) -> None:
        """Give an extent back. A second time, after a new tenant came, or in quarantine, does
        nothing."""
        if self._taken.get(extent.offset) != extent or extent.offset in self._quarantined:
            return
        del self._taken[extent.offset]
        self.free_nbytes += extent.nbytes
        self._insert(extent.offset, extent.nbytes)
        self.serve()

    def quarantine(self, extent: Extent, seconds: float) -> None:
        """``free``, but only after ``seconds``, whoever frees it sooner: a transfer may still
        write into it. Of two quarantines the longer one counts."""
        if self._taken.get(extent.offset) != extent:
            return
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        if extent.offset not in self._quarantined:
            self.quarantined_nbytes += extent.nbytes
        elif self._quarantined[extent.offset] >= until:
            return
        self._quarantined[extent.offset] = until
        loop.call_at(until, self._end_quarantine, extent, until)

    def usage(self) -> dict[str, int]:
        """Bytes by what they are doing; together, the whole pool."""
        leased, cached = self.full()
        return {
            "free": self.free_nbytes,
            "pinned": self.used_nbytes - self.quarantined_nbytes - leased - cached,
            "leased": leased,
            "cached": cached,
            "quarantined": self.quarantined_nbytes,
        }

    def _end_quarantine(self, extent: Extent, until: float) -> None:
        if self._quarantined.get(extent.offset) == until:
            del self._quarantined[extent.offset]
            self.quarantined_nbytes -= extent.nbytes
            self.free(extent)

    def _pages(self, sizes: Sequence[int]) -> list[int]:
        pages = [max(1, -(-nbytes // self._page)) * self._page for nbytes in sizes]
        if sum(pages) > self.nbytes:
            raise PromptTooLong(
                f"{sum(pages)} bytes are needed at once, the pool has {self.nbytes}"
            )
        return pages

    def _take(self, sizes: list[int]) -> list[Extent] | None:
        """All of them, after eviction if that is what it takes, or none."""
        placed = _place(sizes, self._free)
        if placed is None and self._would_fit(sizes):
            while placed is None and self.on_pressure is not None and self.on_pressure(sum(sizes)):
                placed = _place(sizes, self._free)
        if placed is None:
            return None
        starts, self._free = placed
        self.free_nbytes -= sum(sizes)
        extents = []
        for start, size in zip(starts, sizes, strict=True):
            self._generation += 1
            extents.append(Extent(start, size, self._generation))
            self._taken[start] = extents[-1]
        return extents

    def _would_fit(self, sizes: list[int]) -> bool:
        """Without everything that can be evicted. Looked at are, mostly, the first few of it."""
        largest, roomy = max(sizes), 0
        evictable: list[tuple[int, int]] = []
        for extent in self.evictable():
            evictable.append((extent.offset, extent.nbytes))
            roomy += extent.nbytes >= largest
            if roomy == len(sizes):
                return True  # each of the sizes has one to itself
        holes: list[tuple[int, int]] = []
        for start, length in sorted([*self._free, *evictable]):
            if holes and sum(holes[-1]) == start:
                start, length = holes[-1][0], holes.pop()[1] + length
            holes.append((start, length))
        return bool(evictable) and _place(sizes, holes) is not None

    def _insert(self, offset: int, nbytes: int) -> None:
        """Into the sorted free list, joined with its neighbours."""
        index = bisect_left(self._free, (offset, 0))
        if index < len(self._free) and self._free[index][0] == offset + nbytes:
            nbytes += self._free.pop(index)[1]
        if index > 0 and sum(self._free[index - 1]) == offset:
            start, length = self._free[index - 1]
            self._free[index - 1] = (start, length + nbytes)
        else:
            self._free.insert(index, (offset, nbytes))

    def serve(self) -> None:
        """Grant waiters what fits, in order, with bounded bypass.

        Called by itself whenever something is freed; the owner calls it when ``on_pressure`` could
        free more than before.
        """
        if self._serving:
            return
        self._serving = True
        try:
            waiting: list[_Waiter] = []
            for waiter in list(self._waiters):
                if waiting and waiting[0].passed >= BYPASS:
                    break
                extents = self._take(waiter.sizes)
                if extents is None:
                    waiting.append(waiter)
                    continue
                for passed in waiting:
                    passed.passed += 1
                self._waiters.remove(waiter)
                waiter.granted.set_result(extents)
        finally:
            self._serving = False


def _place(sizes: list[int], holes: Sequence[tuple[int, int]]) -> _Placed | None:
    """Where each of the sizes goes, the largest first, into the first hole that has room, and the
    holes that are left; None when one finds no room.

    Holes may exist in which another order would fit; in a single one any order does.
    """
    left = list(holes)
    starts = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        size = sizes[index]
        hole = next((i for i, (_, length) in enumerate(left) if length >= size), None)
        if hole is None:
            return None
        start, length = left[hole]
        starts[index] = start
        left[hole] = (start + size, length - size)
    return starts, [hole for hole in left if hole[1]]
