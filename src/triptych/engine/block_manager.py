"""Who holds which KV blocks, and what those that nobody holds are still good for. Numbers only:
the memory is in ``kv_cache``.

A full block whose content is right may be *named* (``prefix``). From then on it is never written,
several may hold it, and when the last of them has let go of it, it stays until its memory is
needed: whoever brings the same names finds it. Memory is taken first from what has no name, then
from what was let go of the longest time ago, of one holder's blocks the last first: a block is of
no use without those before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockManager:
    """Blocks ``0 .. n_blocks``. Not thread-safe."""

    def __init__(self, n_blocks: int, block_size: int) -> None:
        self.n_blocks = n_blocks
        self.block_size = block_size
        self._free = list(range(n_blocks - 1, -1, -1))
        """Neither held nor named."""
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Named and held by nobody, the one to go first in front."""
        self._held: dict[str, list[int]] = {}
        self._holders = [0] * n_blocks
        """How many hold each block."""
        self._names: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}

    @property
    def n_free(self) -> int:
        """Blocks that can be had, those included that somebody might find again."""
        return len(self._free) + len(self._idle)

    @property
    def n_idle(self) -> int:
        """Blocks that can be had and might be found again."""
        return len(self._idle)

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
        if count > self.n_free:
            return None
        for _ in range(count):
            block = self._take()
            self._holders[block] = 1
            held.append(block)
        self._held[holder] = held
        return tuple(held)

    def release(self, holder: str) -> None:
        """Let go of everything that the holder has. Idempotent."""
        for block in reversed(self._held.pop(holder, ())):
            self._holders[block] -= 1
            if not self._holders[block]:
                if block in self._names:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    # ------------------------------------------------------------------ what can be found again

    def find(self, names: Iterable[bytes]) -> tuple[int, ...]:
        """The blocks with these names, as far as they are there from the first on. No further name
        is asked for."""
        found = []
        for name in names:
            block = self._named.get(name)
            if block is None:
                break
            found.append(block)
        return tuple(found)

    def count_idle(self, blocks: Sequence[int]) -> int:
        """How many of these does nobody hold?"""
        return sum(not self._holders[block] for block in blocks)

    def share(self, holder: str, blocks: Sequence[int]) -> None:
        """They are the first blocks of a holder that has none (asserted)."""
        assert holder not in self._held, holder
        for block in blocks:
            self._idle.pop(block, None)
            self._holders[block] += 1
        self._held[holder] = list(blocks)

    def name(self, block: int, name: bytes) -> None:
        """The block, which is held, is full and right. No effect if another has the name."""
        assert self._holders[block] and block not in self._names, block
        if name not in self._named:
            self._names[block] = name
            self._named[name] = block

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        block, _ = self._idle.popitem(last=False)
        del self._named[self._names.pop(block)]
        return block
