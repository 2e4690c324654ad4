"""Keys and values of one step into the paged cache, by one kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from triptych.engine.kv_cache import KVCache


def write(kv: KVCache, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """As ``KVCache.write``. ``slots``: (tokens,) int64; the last dimension is contiguous."""
    tokens, heads, dim = key.shape
    _write[(tokens,)](
        key,
        value,
        slots,
        kv.data,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        layer * 2 * kv.block_size,
        kv.block_size,
        heads,
        dim,
        triton.next_power_of_2(heads),
        triton.next_power_of_2(dim),
    )


@triton.jit
def _write(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917 - pointers and strides
    key,
    value,
    slots,
    cache,
    key_token,
    key_head,
    value_token,
    value_head,
    first_row,
    block_size,
    n_heads,
    n_dims,
    HEADS: tl.constexpr,
    DIMS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(slots + token) + first_row
    head = tl.arange(0, HEADS)[:, None]
    dim = tl.arange(0, DIMS)[None, :]
    there = (head < n_heads) & (dim < n_dims)
    to = head * n_dims + dim
    width = n_heads * n_dims
    k = tl.load(key + token * key_token + head * key_head + dim, there)
    tl.store(cache + row * width + to, k, there)
    v = tl.load(value + token * value_token + head * value_head + dim, there)
    tl.store(cache + (row + block_size) * width + to, v, there)
