"""Attention over the paged cache by FlashInfer: float16 and bfloat16 on CUDA.

The kernels are planned on the host once per step, for all layers, and launched by the layers
through one custom operator, so that the layers around it can be compiled and a decode step captured
in a CUDA graph. Compiled code must not depend on the step: the operator finds the step by the
thread it runs on, and the layer by counting.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module

from triptych.engine.attention import Part, Window
from triptych.engine.copies import Mark, locked
from triptych.engine.kv_cache import KVCache

WORKSPACE_NBYTES = 256 << 20
"""Of partial results; all plans share it, since one step runs at a time."""
LARGE_CHUNK = 1024
"""Tokens of a chunk that is worth a copy of its keys and values in one piece."""
LONGEST_COPY = 65_536
"""Most tokens that are copied: what a copy of more takes is worth more as KV cache."""
HEAD_DIMS = (64, 128, 256)
"""That FlashInfer has kernels for on every supported GPU."""

Kind = tuple[int, float]
"""What a plan is for besides the step: tokens that a query sees back (0: all), and scaling."""
Write = Callable[[KVCache, int, Tensor, Tensor, Tensor], None]
"""(cache, layer, slots, keys, values): as ``KVCache.write``."""


class FlashAttention:
    """``kernels``: the module ``flashinfer``. ``scratch``: a block of the cache that no sequence
    has. ``places``, ``max_blocks``: as for ``SdpaAttention``. ``dense``: tokens from which on a
    chunk attends to keys and values that lie one behind the other (0: none does)."""

    def __init__(
        self,
        kv: KVCache,
        places: int,
        max_blocks: int,
        scratch: int,
        kernels: Any,
        write: Write,
        dense: int = 0,
    ) -> None:
        self.kv = kv
        self.kernels = kernels
        self.scratch = scratch
        self.max_blocks = max_blocks
        self.dense = dense
        self.heads: dict[Kind, int] = {}
        """Query heads of each kind of layer that the model has been seen to have."""
        self.placed = 0
        """How often a table has begun anew."""
        self._counts = np.zeros(places, np.int64)
        """Blocks of each table."""
        self.workspace = torch.empty(WORKSPACE_NBYTES, dtype=torch.uint8, device=kv.device)
        self._write = write
        self._layers = [(kv.data[:, i, 0], kv.data[:, i, 1]) for i in range(kv.data.shape[1])]
        self._tables = np.zeros((places, max_blocks), np.int32)
        self._step: Step = MixedStep(self, (), np.zeros(0, np.int64))
        self._mixed: dict[Kind, Any] = {}
        self._contiguous: dict[tuple[Kind, int], Any] = {}

    def place(self, place: int, blocks: Seq[int], computed: int) -> None:
        """See ``Attention``. What the blocks held before is never read: no need to clear it."""
        self._tables[place, : len(blocks)] = blocks
        self._counts[place] = len(blocks)
        self.placed += 1

    def extend(self, place: int, blocks: Seq[int]) -> None:
        """See ``Attention``. Of no account to a plan that was made: none goes beyond its tables."""
        count = self._counts[place]
        self._tables[place, count : count + len(blocks)] = blocks
        self._counts[place] += len(blocks)

    def has_room(self, parts: Seq[Part]) -> bool:
        """Are there blocks for all tokens of these?"""
        counts = self._counts[[part.place for part in parts]]
        stops = np.array([part.stop for part in parts])
        return bool((stops <= counts * self.kv.block_size).all())

    def plan(self, parts: Seq[Part], n_decodes: int) -> FlashContext:
        """See ``Attention``."""
        slots = np.concatenate([self._slots(part) for part in parts])
        self.enter(MixedStep(self, parts, slots))
        return CONTEXT

    def enter(self, step: Step) -> None:
        """``step`` is what this thread's next forward belongs to."""
        step.layer = 0
        self._step = step
        _thread.attention = self

    def pages(self, parts: Seq[Part]) -> tuple[Tensor, Tensor, Tensor]:
        """Of each part: where its blocks begin (one more than parts), the blocks, and how many
        tokens the last one holds. int32, on the host."""
        size = self.kv.block_size
        counts = [-(-part.stop // size) for part in parts]
        tables = [self._tables[p.place, :n] for p, n in zip(parts, counts, strict=True)]
        indptr = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        last = np.array([(part.stop - 1) % size + 1 for part in parts], np.int32)
        return (
            torch.from_numpy(indptr),
            torch.from_numpy(np.concatenate(tables)),
            torch.from_numpy(last),
        )

    def mixed(self, kind: Kind) -> Any:
        """The wrapper of any step that is not captured."""
        if kind not in self._mixed:
            self._mixed[kind] = self.kernels.BatchPrefillWithPagedKVCacheWrapper(
                self.workspace, "NHD"
            )
        return self._mixed[kind]

    def contiguous(self, kind: Kind, number: int) -> Any:
        """The wrapper of a step's large chunk of this number."""
        if (kind, number) not in self._contiguous:
            self._contiguous[kind, number] = self.kernels.BatchPrefillWithRaggedKVCacheWrapper(
                self.workspace, "NHD"
            )
        return self._contiguous[kind, number]

    def blocks(self, part: Part) -> Tensor:
        """(blocks,) int64 on the device: those that the part's tokens and all before it lie in."""
        count = -(-part.stop // self.kv.block_size)
        table = torch.from_numpy(self._tables[part.place, :count].astype(np.int64))
        return table.to(self.kv.device, non_blocking=True)

    def decode_slots(self, parts: Seq[Part]) -> NDArray[np.int64]:
        """The slot of each part's only token."""
        size = self.kv.block_size
        tokens = np.array([part.start for part in parts], np.int64)
        places = np.array([part.place for part in parts], np.int64)
        blocks = self._tables[places, tokens // size].astype(np.int64)
        found: NDArray[np.int64] = blocks * self.kv.slot(1, 0) + tokens % size
        return found

    def attend(self, query: Tensor, key: Tensor, value: Tensor, kind: Kind) -> Tensor:
        """Of the step's next layer; (tokens, heads, dim) each."""
        step = self._step
        layer, step.layer = step.layer, step.layer + 1
        self.heads[kind] = query.shape[1]
        self._write(self.kv, layer, step.slots, key, value)
        return step.run(layer, query, key, value, kind)

    def paged(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all blocks, (blocks, block_size, heads, dim) each."""
        return self._layers[layer]

    def options(self, kind: Kind) -> dict[str, Any]:
        """What every plan of this kind is told."""
        window, scaling = kind
        dtype = self.kv.data.dtype
        return {
            "window_left": window - 1,
            "sm_scale": scaling,
            "q_data_type": dtype,
            "kv_data_type": dtype,
        }

    def _slots(self, part: Part) -> NDArray[np.int64]:
        size = self.kv.block_size
        tokens = np.arange(part.start, part.stop)
        blocks = self._tables[part.place, tokens // size].astype(np.int64)
        found: NDArray[np.int64] = blocks * self.kv.slot(1, 0) + tokens % size
        return found


class Step:
    """One forward. ``slots``: (tokens,) int64 on the device."""

    def __init__(self, attention: FlashAttention, slots: Tensor) -> None:
        self.attention = attention
        self.slots = slots
        self.layer = 0
        """That attends next."""

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


class FlashContext:
    """What the layers get. It has no state, so that code compiled for one step serves all."""

    def attend(
        self,
        module: Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: Window,
    ) -> Tensor:
        """See ``Context``."""
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        attended = paged_flash(q.contiguous(), k, v, window or 0, scaling)
        assert isinstance(attended, Tensor)
        return attended


CONTEXT = FlashContext()
_thread = threading.local()


@torch.library.custom_op("triptych::paged_flash", mutates_args=())
def paged_flash(query: Tensor, key: Tensor, value: Tensor, window: int, scaling: float) -> Tensor:
    """The next layer of this thread's step. (tokens, heads, dim) each; returns the same."""
    attention: FlashAttention = _thread.attention
    return attention.attend(query, key, value, (window, scaling))


@paged_flash.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, window: int, scaling: float) -> Tensor:
    return torch.empty_like(query)
