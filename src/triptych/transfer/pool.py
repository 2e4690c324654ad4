"""Pages of one area of a region: contiguous extents, given out in order of arrival.

Who asks first is served first. A later request that fits may pass a waiting larger one, but only
``BYPASS`` times; then everyone waits until the first has its memory. One decision at a time, on
the loop's thread.

Memory that a transfer may still touch is in quarantine: nothing gives it back before its time.
"""

from __future__ import annotations

import asyncio
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from triptych.errors import Overloaded, PromptTooLong
from triptych.observe.metrics import pool_bytes

BYPASS = 16
"""How many later requests may pass a waiting one."""


@dataclass(frozen=True)
class Extent:
    """Contiguous bytes of the region. ``generation`` grows with every allocation of the pool."""

    offset: int
    nbytes: int
    generation: int


@dataclass
class _Waiter:
    nbytes: int
    granted: asyncio.Future[Extent]
    passed: int = 0


class Pool:
    """``nbytes`` of a region from ``offset``, in pages. Used from one event loop's thread.

    ``on_pressure(nbytes)`` is called when an allocation does not fit; it may free something and
    then returns True, and the allocation is tried again.
    """

    def __init__(
        self,
        offset: int,
        nbytes: int,
        page: int = 4096,
        on_pressure: Callable[[int], bool] | None = None,
    ) -> None:
        self.nbytes = nbytes // page * page
        self.free_nbytes = self.nbytes
        """Bytes that are neither in use nor in quarantine (perhaps not contiguous)."""
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

    def try_allocate(self, nbytes: int) -> Extent | None:
        """An extent of at least ``nbytes`` (whole pages), or None when none may be had now.

        Raises PromptTooLong when it could never be had.
        """
        size = self._size(nbytes)
        if self._waiters and self._waiters[0].passed >= BYPASS:
            return None
        extent = self._take(size)
        if extent is None:
            self.serve()  # what was freed in vain may be enough for someone who waits
        elif self._waiters:
            self._waiters[0].passed += 1
        return extent

    async def allocate(self, nbytes: int, timeout_s: float) -> Extent:
        """Like ``try_allocate``, but waits its turn. Raises Overloaded after ``timeout_s``."""
        extent = self.try_allocate(nbytes)
        if extent is not None:
            return extent
        waiter = _Waiter(self._size(nbytes), asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            await asyncio.wait({waiter.granted}, timeout=timeout_s)
            if waiter.granted.done():
                return waiter.granted.result()
        except asyncio.CancelledError:
            if waiter.granted.done():
                self.free(waiter.granted.result())
            raise
        finally:
            if not waiter.granted.done():
                self._waiters.remove(waiter)
                self.serve()
        raise Overloaded(
            f"no room for {nbytes} bytes in a pool of {self.nbytes} within {timeout_s:g} s"
        )

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

    def export(self, name: str, cached: Callable[[], int] | None = None) -> None:
        """Serve the pool's bytes by state as metrics, counted when they are asked for.

        ``cached()``: bytes taken that could be given back at once; a method of the pool's owner.
        """
        # The metrics live as long as the process and must not keep a pool, or its owner, alive.
        pool = weakref.ref(self)
        owner = None if cached is None else weakref.WeakMethod(cached)

        def evictable() -> int:
            count = owner() if owner is not None else None
            return count() if count is not None else 0

        def serve(state: str, count: Callable[[Pool], int]) -> None:
            gauge = pool_bytes.labels(name, state)
            gauge.set_function(lambda: 0 if (it := pool()) is None else count(it))

        serve("free", lambda it: it.free_nbytes)
        serve("cached", lambda it: evictable())
        serve("quarantined", lambda it: it.quarantined_nbytes)
        serve("leased", lambda it: it.used_nbytes - it.quarantined_nbytes - evictable())

    def _end_quarantine(self, extent: Extent, until: float) -> None:
        if self._quarantined.get(extent.offset) == until:
            del self._quarantined[extent.offset]
            self.quarantined_nbytes -= extent.nbytes
            self.free(extent)

    def _size(self, nbytes: int) -> int:
        size = max(1, -(-nbytes // self._page)) * self._page
        if size > self.nbytes:
            raise PromptTooLong(f"{nbytes} bytes do not fit a pool of {self.nbytes} bytes")
        return size

    def _take(self, size: int) -> Extent | None:
        """First fit; asks ``on_pressure`` for as long as that frees something."""
        while (index := self._find(size)) is None:
            if self.on_pressure is None or not self._relieve(size):
                return None
        start, length = self._free[index]
        if length == size:
            del self._free[index]
        else:
            self._free[index] = (start + size, length - size)
        self.free_nbytes -= size
        self._generation += 1
        extent = self._taken[start] = Extent(start, size, self._generation)
        return extent

    def _relieve(self, size: int) -> bool:
        # What is freed for this request must not go to a waiter meanwhile.
        assert self.on_pressure is not None
        serving, self._serving = self._serving, True
        try:
            return self.on_pressure(size)
        finally:
            self._serving = serving

    def _find(self, size: int) -> int | None:
        return next((i for i, (_, length) in enumerate(self._free) if length >= size), None)

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
        """Grant waiters what fits, in order, with bounded bypass of the first.

        Called by itself whenever something is freed; the owner calls it when ``on_pressure`` could
        free more than before.
        """
        if self._serving:
            return
        self._serving = True
        try:
            for waiter in list(self._waiters):
                first = self._waiters[0]
                if waiter is not first and first.passed >= BYPASS:
                    break
                extent = self._take(waiter.nbytes)
                if extent is None:
                    continue
                if waiter is not first:
                    first.passed += 1
                self._waiters.remove(waiter)
                waiter.granted.set_result(extent)
        finally:
            self._serving = False
