"""FlashInfer's two wrappers, as far as the engine uses them, in plain torch: what is planned is
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
            group = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(group, 1) for x in (key, value))
            first, end = int(self.queries[i]), int(self.queries[i + 1])
            for row in range(first, end):
                seen = stop - (end - row) + 1
                left = self.more["window_left"]
                oldest = 0 if left < 0 else max(0, seen - 1 - left)
                scores = torch.einsum("hd,khd->hk", query[row], key[oldest:seen])
                weights = (scores * self.more["sm_scale"]).softmax(-1)
                out[row] = torch.einsum("hk,khd->hd", weights, value[oldest:seen])
        return out


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
