"""FlashInfer's wrappers, as far as the engine uses them, in plain torch: what is planned is
checked, every query is computed by itself. For machines without a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Wrapper:
    def __init__(self, workspace: Tensor, layout: str) -> None:
        assert layout == "NHD" and workspace.dtype == torch.uint8
        self.plans = 0

    def _plan(self, pages: tuple[Tensor, Tensor, Tensor], queries: Tensor, **more: Any) -> None:
        assert all(tensor.dtype == torch.int32 for tensor in (*pages, queries))
        indptr, blocks, last = pages
        n = len(last)
        assert len(indptr) == len(queries) == n + 1 and int(indptr[-1]) == len(blocks)
        assert bool((indptr.diff() > 0).all()) and bool((last > 0).all())
        self.pages, self.queries, self.more = pages, queries, more
        self.plans += 1

    def run(self, query: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
        """(tokens, heads, dim) to the same."""
        out = torch.empty_like(query)
        indptr, blocks, last = self.pages
        size = memory[0].shape[1]
        for i in range(len(last)):
            table = blocks[indptr[i] : indptr[i + 1]].long()
            stop = (len(table) - 1) * size + int(last[i])
            key, value = (part[table].flatten(0, 1)[:stop] for part in memory)
            rows = slice(int(self.queries[i]), int(self.queries[i + 1]))
            out[rows] = _attended(query[rows], key, value, **self.more)
        return out


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window_left: int,
    sm_scale: float,
    q_data_type: torch.dtype,
    kv_data_type: torch.dtype,
) -> Tensor:
    """Of the last tokens, as many as queries, to all up to each of them."""
    assert query.dtype == q_data_type and key.dtype == value.dtype == kv_data_type
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    out = torch.empty_like(query)
    for row in range(len(query)):
        seen = len(key) - len(query) + row + 1
        oldest = 0 if window_left < 0 else max(0, seen - 1 - window_left)
        scores = torch.einsum("hd,khd->hk", query[row], key[oldest:seen])
        weights = (scores * sm_scale).softmax(-1)
        out[row] = torch.einsum("hk,khd->hd", weights, value[oldest:seen])
    return out


class BatchPrefillWithRaggedKVCacheWrapper:
    """Of one sequence."""

    def __init__(self, workspace: Tensor, layout: str) -> None:
        assert layout == "NHD" and workspace.dtype == torch.uint8

    def plan(
        self,
        queries: Tensor,
        keys: Tensor,
        heads: int,
        kv_heads: int,
        dim: int,
        *,
        causal: bool,
        **more: Any,
    ) -> None:
        assert causal and heads % kv_heads == 0
        assert queries.dtype == keys.dtype == torch.int32
        (first, self.n_queries), (begin, self.n_keys) = queries.tolist(), keys.tolist()
        assert first == begin == 0 < self.n_queries <= self.n_keys
        self.more = more

    def run(self, query: Tensor, key: Tensor, value: Tensor, *, out: Tensor) -> Tensor:
        assert len(query) == len(out) == self.n_queries
        assert len(key) == len(value) == self.n_keys
        return out.copy_(_attended(query, key, value, **self.more))


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def plan(
        self,
        queries: Tensor,
        indptr: Tensor,
        blocks: Tensor,
        last: Tensor,
        heads: int,
        kv_heads: int,
        dim: int,
        size: int,
        *,
        causal: bool,
        **more: Any,
    ) -> None:
        assert causal and heads % kv_heads == 0
        self._plan((indptr, blocks, last), queries, **more)


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        workspace: Tensor,
        layout: str,
        *,
        use_cuda_graph: bool,
        use_tensor_cores: bool,
        paged_kv_indptr_buffer: Tensor,
        paged_kv_indices_buffer: Tensor,
        paged_kv_last_page_len_buffer: Tensor,
    ) -> None:
        super().__init__(workspace, layout)
        assert use_cuda_graph and use_tensor_cores
        self.size = len(paged_kv_last_page_len_buffer)
        self.room = len(paged_kv_indices_buffer)
        assert len(paged_kv_indptr_buffer) == self.size + 1

    def plan(
        self,
        indptr: Tensor,
        blocks: Tensor,
        last: Tensor,
        heads: int,
        kv_heads: int,
        dim: int,
        size: int,
        **more: Any,
    ) -> None:
        assert len(last) == self.size and len(blocks) <= self.room and heads % kv_heads == 0
        self._plan((indptr, blocks, last), torch.arange(self.size + 1, dtype=torch.int32), **more)
