"""Memory of full embeddings: leased to somebody, or cached for whoever asks next.

A pool holds thousands of them, so they are counted as they change and not when somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterable

from triptych.transfer.pool import Extent


class Kept:
    def __init__(self) -> None:
        self._leased: dict[int, Extent] = {}
        self._cached: dict[int, Extent] = {}
        """By slot."""
        self.leased_nbytes = 0
        self.cached_nbytes = 0

    def lease(self, slot: int, extent: Extent) -> None:
        """Somebody has it now. Idempotent."""
        if slot not in self._leased:
            self.forget(slot)
            self._leased[slot] = extent
            self.leased_nbytes += extent.nbytes

    def cache(self, slot: int, extent: Extent) -> None:
        """Nobody has it any more. Idempotent."""
        if slot not in self._cached:
            self.forget(slot)
            self._cached[slot] = extent
            self.cached_nbytes += extent.nbytes

    def forget(self, slot: int) -> None:
        """Idempotent."""
        if (extent := self._leased.pop(slot, None)) is not None:
            self.leased_nbytes -= extent.nbytes
        if (extent := self._cached.pop(slot, None)) is not None:
            self.cached_nbytes -= extent.nbytes

    def evictable(self) -> Iterable[Extent]:
        """Embeddings that nobody has leased: they stay until their room is needed."""
        return self._cached.values()

    def full(self) -> tuple[int, int]:
        """Bytes leased, bytes cached."""
        return self.leased_nbytes, self.cached_nbytes
