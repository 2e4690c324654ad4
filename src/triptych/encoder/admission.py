"""Room in the pool for the images of one request: all of it, or a named refusal.

Most requests find room at once. The others wait in line, and one at a time collects what it
needs: if two collected at once, each could hold what the other waits for.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from triptych.errors import Cancelled, Overloaded, PromptTooLong, TriptychError
from triptych.transfer.pool import Extent, Pool
from triptych.transfer.region import round_up

REMEMBERED_CANCELS = 4096
"""A cancel may overtake the request it is about: so many are remembered."""


class Admission:
    """Used from the event loop's thread. ``wait_s``: longest wait for room."""

    def __init__(self, pool: Pool, wait_s: float) -> None:
        self._pool = pool
        self._wait_s = wait_s
        self._turn = asyncio.Lock()
        self._waiting: dict[asyncio.Task[list[Extent]], str] = {}
        self._cancelled: OrderedDict[str, None] = OrderedDict()

    def check(self, request_id: str) -> None:
        """Raises Cancelled when the request's cancel has come already."""
        if request_id in self._cancelled:
            raise Cancelled(f"request {request_id} was cancelled")

    async def take(self, sizes: list[int], request_id: str) -> list[Extent]:
        """One extent per size, in bytes.

        Raises PromptTooLong: more than the whole pool. Overloaded: no room within ``wait_s``.
        Cancelled: by ``cancel``.
        """
        total = sum(round_up(size) for size in sizes)
        if total > self._pool.nbytes:
            raise PromptTooLong(
                f"the request's embeddings take {total} bytes, the pool has {self._pool.nbytes}"
            )
        extents = self._take_now(sizes)
        if extents is None:
            extents = await self._wait(sizes, request_id)
        return extents

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

    def _take_now(self, sizes: list[int]) -> list[Extent] | None:
        extents: list[Extent] = []
        for size in sizes:
            extent = self._pool.try_allocate(size)
            if extent is None:
                self._free(extents)
                return None
            extents.append(extent)
        return extents

    async def _wait(self, sizes: list[int], request_id: str) -> list[Extent]:
        task = asyncio.create_task(self._collect(sizes))
        self._waiting[task] = request_id
        try:
            extents = await task
        except asyncio.CancelledError:
            if task.done() and not task.cancelled() and task.exception() is None:
                self._free(task.result())  # it succeeded while its request was being cancelled
            self.check(request_id)
            raise
        finally:
            del self._waiting[task]
        if request_id in self._cancelled:
            self._free(extents)
            self.check(request_id)
        return extents

    async def _collect(self, sizes: list[int]) -> list[Extent]:
        extents: list[Extent] = []
        try:
            async with asyncio.timeout(self._wait_s), self._turn:
                for size in sizes:
                    extents.append(await self._pool.allocate(size, self._wait_s))
        except TimeoutError as exc:
            self._free(extents)
            raise Overloaded(f"no room in the encoder's pool within {self._wait_s:g} s") from exc
        except (TriptychError, asyncio.CancelledError):
            self._free(extents)
            raise
        return extents

    def _free(self, extents: list[Extent]) -> None:
        for extent in extents:
            self._pool.free(extent)
