"""Steps of FlashInfer's attention: what is planned for one forward, and run by its layers."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triptych.engine.attention import Part
from triptych.engine.copies import Mark, locked

if TYPE_CHECKING:
    from triptych.engine.flash_attention import FlashAttention

LONGEST_COPY = 65_536
"""Most tokens that are copied: what a copy of more takes is worth more as KV cache."""

Kind = tuple[int, float]
"""What a plan is for besides the step: tokens that a query sees back (0: all), and scaling."""


class Step:
    """One forward. ``slots``: (tokens,) int64 on the device."""

    def __init__(self, attention: FlashAttention, slots: Tensor) -> None:
        self.attention = attention
        self.slots = slots
        self.layer = 0
        """That attends next."""
        self.nearly: Mark | None = None

    def run(self, layer: int, query: Tensor, key: Tensor, value: Tensor, kind: Kind) -> Tensor:
        """As ``FlashAttention.attend``; keys and values are in the cache as well."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class _Large:
    """A chunk that attends to keys and values in one piece."""

    part: Part
    rows: slice
    """Of the step's tokens."""
    planes: Tensor | None
    """Where its keys and values lie, (layers, 2, blocks); None: the layer has just made all."""


class MixedStep(Step):
    """Any parts. Planned when the first layer of a kind asks.

    Large chunks attend to a copy of their keys and values in one piece, and those of a prompt's
    beginning to what the layer has just made: FlashInfer reads blocks token by token and a piece in
    large tiles, which takes a fifth less on an H200, copy included. The rest attends to blocks.
    """

    def __init__(
        self, attention: FlashAttention, parts: Seq[Part], slots: NDArray[np.int64]
    ) -> None:
        device = attention.kv.device
        super().__init__(attention, torch.from_numpy(slots).to(device, non_blocking=True))
        self._planned: dict[Kind, tuple[Any, list[Any]]] = {}
        self._large: list[_Large] = []
        self._small: list[Part] = []
        small: list[range] = []
        first = 0
        for part in parts:
            last = first + part.stop - part.start
            if 0 < attention.dense <= last - first and part.stop <= LONGEST_COPY:
                planes = attention.kv.planes(attention.blocks(part)) if part.start else None
                self._large.append(_Large(part, slice(first, last), planes))
            else:
                self._small.append(part)
                small.append(range(first, last))
            first = last
        self._small_rows: Tensor | None = None
        """(tokens,) of the small ones, where there are both."""
        if self._large and small:
            rows = np.concatenate([np.array(each) for each in small])
            self._small_rows = torch.from_numpy(rows).to(device, non_blocking=True)

    def run(self, layer: int, query: Tensor, key: Tensor, value: Tensor, kind: Kind) -> Tensor:
        """See ``Step``."""
        if kind not in self._planned:
            self._planned[kind] = self._plan(kind)
        if layer == self.attention.late_layer:
            self.nearly = Mark(self.attention.kv.device)
        paged, contiguous = self._planned[kind]
        if not self._large:
            found: Tensor = paged.run(query, self.attention.paged(layer))
            return found
        out = torch.empty_like(query)
        for chunk, wrapper in zip(self._large, contiguous, strict=True):
            rows, planes = chunk.rows, chunk.planes
            if planes is None:
                k, v = key[rows], value[rows]
            else:
                k, v = self.attention.kv.read(planes[layer])[:, : chunk.part.stop]
            wrapper.run(query[rows], k, v, out=out[rows])
        if self._small_rows is not None:
            some = query.index_select(0, self._small_rows)
            out.index_copy_(0, self._small_rows, paged.run(some, self.attention.paged(layer)))
        return out

    def _plan(self, kind: Kind) -> tuple[Any, list[Any]]:
        """Wrappers of the small parts together, if there are any, and of each large one."""
        attention, shape = self.attention, self.attention.kv.data.shape
        heads = attention.heads[kind], shape[-2], shape[-1]
        options = {"causal": True, **attention.options(kind)}
        if kind in attention.planned:
            attention.planned[kind].wait()
        contiguous = [attention.contiguous(kind, i) for i in range(len(self._large))]
        for chunk, wrapper in zip(self._large, contiguous, strict=True):
            sizes = chunk.part.stop - chunk.part.start, chunk.part.stop
            ends = (torch.tensor([0, size], dtype=torch.int32) for size in sizes)
            wrapper.plan(*ends, *heads, **options)
        paged = None
        if self._small:
            paged = attention.mixed(kind)
            queries = np.cumsum([0, *(part.stop - part.start for part in self._small)])
            pages = torch.from_numpy(queries.astype(np.int32)), *attention.pages(self._small)
            paged.plan(*pages, *heads, attention.kv.block_size, **options)
        attention.planned[kind] = Mark(attention.kv.device)
        return paged, contiguous


class DecodeStep(Step):
    """``size`` decodes, always in the same memory, as a CUDA graph needs it. Those that ``load``
    does not fill compute in the scratch block."""

    def __init__(self, attention: FlashAttention, size: int) -> None:
        device = attention.kv.device
        super().__init__(attention, torch.zeros(size, dtype=torch.int64, device=device))
        self._size = size

        def buffer(length: int) -> Tensor:
            return torch.zeros(length, dtype=torch.int32, device=device)

        self._loaded: tuple[Seq[Part], int] | None = None
        """What is planned for, and how often a table had changed by then."""
        self._planned = Mark(device)
        """Behind the copies of the last plan: the kernels' wrappers write each one into the same
        page-locked memory on the host."""
        self._wrappers = {
            kind: attention.kernels.BatchDecodeWithPagedKVCacheWrapper(
                attention.workspace,
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=True,  # those without refuse a group of seven query heads
                paged_kv_indptr_buffer=buffer(size + 1),
                paged_kv_indices_buffer=buffer(size * attention.max_blocks),
                paged_kv_last_page_len_buffer=buffer(size),
            )
            for kind in attention.heads
        }

    def load(self, parts: Seq[Part]) -> None:
        """Plan for these decodes, ``size`` at most; nothing to do if they are as foreseen."""
        if (parts, self.attention.placed) != self._loaded:
            self._load(parts)

    def foresee(self, parts: Seq[Part]) -> None:
        """While the device computes these: plan for one token more of each, as it mostly comes."""
        then = [Part(part.place, part.start + 1, part.stop + 1) for part in parts]
        if self.attention.has_room(then):
            self._load(then)

    def _load(self, parts: Seq[Part]) -> None:
        attention, shape = self.attention, self.attention.kv.data.shape
        self._planned.wait()
        self._loaded = parts, attention.placed
        n_idle = self._size - len(parts)
        slots = np.full(self._size, attention.kv.slot(attention.scratch, 0), np.int64)
        pages = [torch.arange(n_idle + 1, dtype=torch.int32)]
        pages += [torch.full((n_idle,), attention.scratch, dtype=torch.int32)]
        pages += [torch.ones(n_idle, dtype=torch.int32)]
        if parts:
            slots[: len(parts)] = attention.decode_slots(parts)
            indptr, blocks, last = attention.pages(parts)
            pages[0] = torch.cat([indptr, indptr[-1] + pages[0][1:]])
            pages[1:] = [torch.cat([blocks, pages[1]]), torch.cat([last, pages[2]])]
        # From page-locked memory: the host must not wait for what the device computes meanwhile.
        device = self.slots.device
        self.slots.copy_(locked(torch.from_numpy(slots), device), non_blocking=True)
        indptr, blocks, last = (locked(each, device) for each in pages)
        pages = [indptr, blocks.to(device, non_blocking=True), last]
        for kind, wrapper in self._wrappers.items():
            wrapper.plan(
                *pages,
                attention.heads[kind],
                shape[-2],
                shape[-1],
                attention.kv.block_size,
                **attention.options(kind),
            )
        self._planned = Mark(device)

    def run(self, layer: int, query: Tensor, key: Tensor, value: Tensor, kind: Kind) -> Tensor:
        """See ``Step``."""
        found: Tensor = self._wrappers[kind].run(query, self.attention.paged(layer))
        return found
