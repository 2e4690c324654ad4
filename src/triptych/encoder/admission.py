"""Room in the pool for the images of one request: all of it, or a named refusal.

Most requests find room at once. The others wait in the pool's line, holding nothing in the pool.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from triptych.errors import Cancelled, NoRoom
from triptych.transfer.pool import Extent, Pool

REMEMBERED_CANCELS = 4096
"""A cancel may overtake the request it is about: so many are remembered."""


class Admission:
    """Used from the event loop's thread."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._waiting: dict[asyncio.Task[list[Extent]], str] = {}
        self._cancelled: OrderedDict[str, None] = OrderedDict()

    def check(self, request_id: str) -> None:
        """Raises Cancelled when the request's cancel has come already."""
        if request_id in self._cancelled:
            raise Cancelled(f"request {request_id} was cancelled")

    def take_now(self, sizes: list[int]) -> list[Extent]:
        """One extent per size, in bytes. Raises PromptTooLong: more than the whole pool. NoRoom."""
        extents = self._pool.try_allocate_all(sizes)
        if extents is None:
            raise NoRoom(f"no room for {sum(sizes)} bytes in a pool of {self._pool.nbytes} now")
        return extents

    async def take(self, sizes: list[int], request_id: str, wait_s: float) -> list[Extent]:
        """``take_now``, but waits. Raises Overloaded: no room within ``wait_s``. Cancelled: by
        ``cancel``."""
        extents = self._pool.try_allocate_all(sizes)
        return await self._wait(sizes, request_id, wait_s) if extents is None else extents

    def cancel(self, request_id: str) -> None:
        """End the request's wait, and refuse it should it only come now. Idempotent."""
        self._cancelled[request_id] = None
        while len(self._cancelled) > REMEMBERED_CANCELS:
            self._cancelled.popitem(last=False)
        for task, waiting in self._waiting.items():
            if waiting == request_id:
                task.cancel()

    def close(self) -> None:
        """End every wait."""
        for task in self._waiting:
            task.cancel()

    async def _wait(self, sizes: list[int], request_id: str, wait_s: float) -> list[Extent]:
        task = asyncio.create_task(self._pool.allocate_all(sizes, wait_s))
        self._waiting[task] = request_id
        try:
            extents = await task
        except asyncio.CancelledError:
            if task.done() and not task.cancelled() and task.exception() is None:
                # it succeeded while its request was being cancelled
                self._pool.free_all(task.result())
            self.check(request_id)
            raise
        finally:
            del self._waiting[task]
        if request_id in self._cancelled:
            self._pool.free_all(extents)
            self.check(request_id)
        return extents
