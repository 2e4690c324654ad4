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
HEAD_DIMS = (64, 128, 256)
"""That FlashInfer has kernels for on every supported GPU."""

Kind = tuple[int, float]
"""What a plan is for besides the step: tokens that a query sees back (0: all), and scaling."""
Write = Callable[[KVCache, int, Tensor, Tensor, Tensor], None]
"""(cache, layer, slots, keys, values): as ``KVCache.write``."""


class FlashAttention:
    """``kernels``: the module ``flashinfer``. ``scratch``: a block of the cache that no sequence
    has. ``places``, ``max_blocks``: as for ``SdpaAttention``."""

    def __init__(
        self, kv: KVCache, places: int, max_blocks: int, scratch: int, kernels: Any, write: Write
    ) -> None:
        self.kv = kv
        self.kernels = kernels
        self.scratch = scratch
        self.max_blocks = max_blocks
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
        attended = step.wrapper(kind).run(query, self._layers[layer])
        assert isinstance(attended, Tensor)
        return attended

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

    def wrapper(self, kind: Kind) -> Any:
        """Planned for this step."""
        raise NotImplementedError


class MixedStep(Step):
    """Any parts. Planned when the first layer of a kind asks."""

    def __init__(
        self, attention: FlashAttention, parts: Seq[Part], slots: NDArray[np.int64]
    ) -> None:
        device = attention.kv.device
        super().__init__(attention, torch.from_numpy(slots).to(device, non_blocking=True))
        self._parts = parts
        self._planned: dict[Kind, Any] = {}

    def wrapper(self, kind: Kind) -> Any:
        """See ``Step``."""
        if kind not in self._planned:
            attention, shape = self.attention, self.attention.kv.data.shape
            wrapper = self._planned[kind] = attention.mixed(kind)
            queries = np.cumsum([0, *(part.stop - part.start for part in self._parts)])
            wrapper.plan(
                torch.from_numpy(queries.astype(np.int32)),
                *attention.pages(self._parts),
                attention.heads[kind],
                shape[-2],
                shape[-1],
                attention.kv.block_size,
                causal=True,
                **attention.options(kind),
            )
        return self._planned[kind]


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

    def wrapper(self, kind: Kind) -> Any:
        """See ``Step``."""
        return self._wrappers[kind]


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
