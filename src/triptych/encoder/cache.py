"""Which embeddings the pool holds, and which of them may go. No torch, no memory of its own.

The pool is the cache: an embedding stays in its slot until somebody needs the room. A slot that
is leased is pinned; who has leased it is not known here. A slot that is still being filled is
found as well, so that equal images that arrive together are encoded once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class _Entry:
    key: str
    full: bool = False


class EmbeddingCache:
    """Content key → slot number, least recently used first."""

    def __init__(self) -> None:
        self._slots: dict[str, int] = {}
        self._entries: OrderedDict[int, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: str) -> int | None:
        """The slot that has, or will have, the embedding; it counts as used now."""
        slot = self._slots.get(key)
        if slot is not None:
            self._entries.move_to_end(slot)
        return slot

    def add(self, key: str, slot: int) -> None:
        """A new slot, still being filled."""
        assert key not in self._slots and slot not in self._entries
        self._slots[key] = slot
        self._entries[slot] = _Entry(key)

    def filled(self, slot: int) -> None:
        self._entries[slot].full = True

    def remove(self, slot: int) -> None:
        """Idempotent."""
        entry = self._entries.pop(slot, None)
        if entry is not None:
            del self._slots[entry.key]

    def evict(self, pinned: Callable[[int], bool]) -> int | None:
        """Forget the least recently used slot that is full and not pinned, and name it."""
        for slot, entry in self._entries.items():
            if entry.full and not pinned(slot):
                self.remove(slot)
                return slot
        return None
