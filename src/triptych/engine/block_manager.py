"""Who holds which KV blocks. Numbers only: the memory is in ``kv_cache``."""

from __future__ import annotations


class BlockManager:
    """Blocks ``0 .. n_blocks``, each free or held by one request. Not thread-safe."""

    def __init__(self, n_blocks: int, block_size: int) -> None:
        self.n_blocks = n_blocks
        self.block_size = block_size
        self._free = list(range(n_blocks - 1, -1, -1))
        self._held: dict[str, list[int]] = {}

    @property
    def n_free(self) -> int:
        return len(self._free)

    def blocks_for(self, n_tokens: int) -> int:
        return -(-n_tokens // self.block_size)

    def fits(self, n_tokens: int) -> bool:
        """Could ``n_tokens`` be held if nobody else held anything?"""
        return self.blocks_for(n_tokens) <= self.n_blocks

    def grow(self, holder: str, n_tokens: int) -> tuple[int, ...] | None:
        """All blocks of the holder, in the order of its tokens, once they have room for
        ``n_tokens``; None, and nothing is taken, if too few are free."""
        held = self._held.get(holder, [])
        count = self.blocks_for(n_tokens) - len(held)
        if count > len(self._free):
            return None
        held.extend(self._free.pop() for _ in range(count))
        self._held[holder] = held
        return tuple(held)

    def release(self, holder: str) -> None:
        """Free everything that the holder has. Idempotent."""
        self._free.extend(reversed(self._held.pop(holder, ())))
