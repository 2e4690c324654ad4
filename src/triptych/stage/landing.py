"""Room for embeddings, given out in the order in which it is asked for.

So nobody waits for room that is held by somebody who waits for him. A request that waits while
nobody but itself has any is *cramped*: the engine is told, since it would wait for its last image
in vain before it uses the first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from triptych.transfer.pool import Extent, Pool


class LandingRoom:
    """Owner of ``pool``'s extents. Used from the event loop's thread."""

    def __init__(self, pool: Pool, timeout_s: float, on_cramped: Callable[[str], None]) -> None:
        self.turn = asyncio.Lock()
        """Held by the request that takes room. Whoever holds room was asked for before whoever
        waits for it."""
        self._pool = pool
        self._timeout_s = timeout_s
        self._on_cramped = on_cramped
        self._waiting = ""
        """The request that took, or takes, room last."""
        self._taken: dict[Extent, str] = {}
        """All that is taken, by request."""

    async def take(self, request_id: str, nbytes: int) -> Extent:
        """Whoever calls it has the turn. Raises Overloaded and PromptTooLong."""
        self._waiting = request_id
        extent = self._pool.try_allocate(nbytes)
        if extent is None:
            self._see_who_is_cramped()
            extent = await self._pool.allocate(nbytes, self._timeout_s)
        self._taken[extent] = request_id
        return extent

    def free(self, extent: Extent, quarantine_s: float = 0.0) -> None:
        """Idempotent."""
        self._taken.pop(extent, None)
        if quarantine_s > 0:
            self._pool.quarantine(extent, quarantine_s)
        else:
            self._pool.free(extent)
        if self._pool.is_waited_for:
            self._see_who_is_cramped()

    def _see_who_is_cramped(self) -> None:
        if all(owner == self._waiting for owner in self._taken.values()):
            self._on_cramped(self._waiting)
