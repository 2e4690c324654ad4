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
from triptych.engine.copies import Mark
from triptych.engine.flash_steps import Kind, MixedStep, Step
from triptych.engine.kv_cache import KVCache

WORKSPACE_NBYTES = 256 << 20
"""Of partial results; all plans share it, since one step runs at a time."""
LARGE_CHUNK = 1024
"""Tokens of a chunk that is worth a copy of its keys and values in one piece."""
LATE = 6
"""When the last of so many parts of a mixed step's layers begins it is nearly over: what a GPU
takes for those is about what a host takes to schedule and launch the next."""
HEAD_DIMS = (64, 128, 256)
"""That FlashInfer has kernels for on every supported GPU."""

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
        self.planned: dict[Kind, Mark] = {}
        """Behind the copies of the last plan of each kind of mixed step, which is written into the
        same page-locked memory on the host as the next."""
        self.late_layer = kv.data.shape[1] - max(1, kv.data.shape[1] // LATE)
        self._counts = np.zeros(places, np.int64)
        """Blocks of each table."""
        self.workspace = torch.empty(WORKSPACE_NBYTES, dtype=torch.uint8, device=kv.device)
        self._write = write
        self._layers = [(kv.data[:, i, 0], kv.data[:, i, 1]) for i in range(kv.data.shape[1])]
        self._tables = np.zeros((places, max_blocks), np.int32)
        self._step: Step = MixedStep(self, (), np.zeros(0, np.int64))
        self._mixed: dict[Kind, Any] = {}
        self._contiguous: dict[tuple[Kind, int], Any] = {}

    @property
    def nearly(self) -> Mark | None:
        """See ``Attention``."""
        return self._step.nearly

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
