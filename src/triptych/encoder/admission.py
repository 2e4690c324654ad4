"""Room in the pool for the images of one request: all of it, or a named refusal.

Most requests find room at once. The others wait in the pool's line, holding nothing in the pool.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from triptych.encoder.scheduler import RETRY_AFTER_S
from triptych.errors import Cancelled, NoRoom, Overloaded
from triptych.stage.cancels import Cancels
from triptych.transfer.pool import Extent, Pool


@dataclass(frozen=True)
class Given:
    """Room that a request got."""

    at: float
    """Monotonic seconds."""
    nbytes: int


def retry_after(nbytes: int, given: Iterable[Given], now: float, waited_s: float) -> float:
    """Seconds until ``nbytes`` more will have been given out, within ``RETRY_AFTER_S``: as it went
    during the last ``waited_s``, when the pool was full and gave what came back to it. If that was
    nothing, as long again."""
    shortest, longest = RETRY_AFTER_S
    total = sum(one.nbytes for one in given if one.at > now - waited_s)
    seconds = waited_s * nbytes / total if total else waited_s
    return min(longest, max(shortest, seconds))


class Admission:
    """Used from the event loop's thread."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._waiting: dict[asyncio.Task[list[Extent]], str] = {}
        self._wanted: dict[asyncio.Task[list[Extent]], int] = {}
        """Bytes that each of them waits for."""
        self._given: deque[Given] = deque()
        """Of the last ``RETRY_AFTER_S``."""
        self._cancels = Cancels()

    def check(self, request_id: str) -> None:
        """Raises Cancelled when the request's cancel has come already."""
        self._cancels.check(request_id)

    def take_now(self, sizes: list[int]) -> list[Extent]:
        """One extent per size, in bytes. Raises PromptTooLong: more than the whole pool. NoRoom."""
        extents = self._pool.try_allocate_all(sizes)
        if extents is None:
            raise NoRoom(f"no room for {sum(sizes)} bytes in a pool of {self._pool.nbytes} now")
        return self._count(extents)

    async def take(self, sizes: list[int], request_id: str, wait_s: float) -> list[Extent]:
        """``take_now``, but waits. Raises Overloaded: no room within ``wait_s``. Cancelled: by
        ``cancel``."""
        extents = self._pool.try_allocate_all(sizes)
        if extents is None:
            extents = await self._wait(sizes, request_id, wait_s)
        return self._count(extents)

    def cancel(self, request_id: str) -> None:
        """End the request's wait, and refuse it should it only come now. Idempotent."""
        self._cancels.add(request_id)
        for task, waiting in self._waiting.items():
            if waiting == request_id:
                task.cancel()

    def close(self) -> None:
        """End every wait."""
        for task in self._waiting:
            task.cancel()

    def _count(self, extents: list[Extent]) -> list[Extent]:
        now = time.monotonic()
        self._given.append(Given(now, sum(extent.nbytes for extent in extents)))
        while self._given[0].at < now - RETRY_AFTER_S[1]:
            self._given.popleft()
        return extents

    async def _wait(self, sizes: list[int], request_id: str, wait_s: float) -> list[Extent]:
        task = asyncio.create_task(self._pool.allocate_all(sizes, wait_s))
        self._waiting[task] = request_id
        self._wanted[task] = sum(sizes)
        try:
            extents = await task
        except Overloaded as refused:
            # Should it come again, those that wait now are before it.
            wanted = sum(self._wanted.values())
            refused.retry_after_s = retry_after(wanted, self._given, time.monotonic(), wait_s)
            raise
        except asyncio.CancelledError:
            if task.done() and not task.cancelled() and task.exception() is None:
                # it succeeded while its request was being cancelled
                self._pool.free_all(task.result())
            self.check(request_id)
            raise
        finally:
            del self._waiting[task], self._wanted[task]
        try:
            self.check(request_id)
        except Cancelled:
            self._pool.free_all(extents)
            raise
        return extents
