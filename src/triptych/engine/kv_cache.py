"""Memory of keys and values: ``[block, layer, k/v, token, head, dim]``.

A block is contiguous across layers, so that handing it to another worker moves one piece. A *slot*
is the row of one token's key in layer 0 when the memory is seen as ``(rows, head * dim)``; its
value and other layers' rows lie at constant distances from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.errors import ConfigError


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token's keys and values are made of."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def block_nbytes(self, block_size: int) -> int:
        elements = self.num_layers * 2 * block_size * self.num_kv_heads * self.head_dim
        return elements * self.dtype.itemsize


class KVCache:
    """Views of one piece of memory.

    ``memory``: (nbytes,) uint8, contiguous, aligned to the dtype; it may lie in memory that a
    transport reads and writes. Raises ConfigError if it has no room for one block.
    """

    def __init__(self, memory: Tensor, shape: KVShape, block_size: int) -> None:
        self.block_nbytes = shape.block_nbytes(block_size)
        self.block_size = block_size
        self.n_blocks = memory.numel() // self.block_nbytes
        if self.n_blocks < 1:
            raise ConfigError(
                f"the KV cache of {memory.numel()} bytes has no room for one block of "
                f"{block_size} tokens ({self.block_nbytes} bytes)"
            )
        used = memory[: self.n_blocks * self.block_nbytes].view(shape.dtype)
        self.data = used.view(
            self.n_blocks,
            shape.num_layers,
            2,
            block_size,
            shape.num_kv_heads,
            shape.head_dim,
        )
        self._planes_per_block = shape.num_layers * 2
        self._planes = used.view(self.n_blocks * self._planes_per_block, -1)
        self._rows = used.view(-1, shape.num_kv_heads * shape.head_dim)

    @property
    def device(self) -> torch.device:
        return self.data.device

    def offset(self, block: int) -> int:
        """First byte of the block in ``memory``."""
        return block * self.block_nbytes

    def slot(self, block: int, offset: int) -> int:
        """Of the token at ``offset`` in the block."""
        return block * self._planes_per_block * self.block_size + offset

    def slots(self, table: Tensor) -> Tensor:
        """(n,) blocks to (n * block_size,) slots of their tokens."""
        first = table[:, None] * (self._planes_per_block * self.block_size)
        return (first + torch.arange(self.block_size, device=table.device)).flatten()

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """``slots``: (tokens,); ``key``, ``value``: (tokens, head, dim)."""
        rows = slots + layer * 2 * self.block_size
        self._rows.index_copy_(0, rows, key.flatten(1))
        self._rows.index_copy_(0, rows + self.block_size, value.flatten(1))

    def planes(self, table: Tensor) -> Tensor:
        """(n,) blocks to (layers, 2, n): what ``read`` is told for their keys and values."""
        within = torch.arange(self._planes_per_block, device=table.device).view(-1, 2, 1)
        return table * self._planes_per_block + within

    def read(self, planes: Tensor) -> Tensor:
        """A copy of keys and values, (2, n * block_size, head, dim), from a layer's ``planes``."""
        return self._planes.index_select(0, planes.flatten()).view(2, -1, *self.data.shape[-2:])

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero the blocks: attention gives padding no weight, but 0 * NaN of an earlier holder
        would be NaN."""
        if blocks:
            self.data.index_fill_(0, torch.tensor(blocks, device=self.device), 0)
