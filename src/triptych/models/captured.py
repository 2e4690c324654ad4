"""Forwards of a vision tower as CUDA graphs, for batches of any sizes.

A tower of 32 blocks is some 500 kernels, which Python launches in more time than a GPU needs to
compute a 1080p image, and in far more than it needs for a small one. A captured forward is launched
at once. A graph computes one shape, so batches are filled up to one of few: with patches that
nobody looks at, in a sequence of their own, and with sequences of no patches.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

logger = logging.getLogger(__name__)

STEP = 256
"""Patches are filled up to multiples of this."""
MOST_PATCHES = 1 << 14
"""Of a captured forward. Beyond, launches take less time than the GPU."""
MOST_GRAPHS = 48
SEEN = 2
"""A shape is captured when it comes for the time after these."""
BY_PATCH = ("position_ids", "interp_indices", "interp_weights")
"""Arguments of (patches, ...), as the pixels."""
ENDS = {"cu_seqlens": "max_seqlen", "cu_window_seqlens": "max_window_seqlen"}
"""Where sequences end → patches of the longest one."""
ORDER = "window_index"
"""(rows after merging,) order by window."""
PASSED_ON = ("grid_thw", "return_dict")
"""All that follows from the grids is given: they are not looked at."""
ARGUMENTS = {*BY_PATCH, *ENDS, *ENDS.values(), ORDER, *PASSED_ON}

Compute = Callable[[], None]
Capture = Callable[[Compute], Compute]
"""Makes a function that computes the same again, from and into the same memory."""


@dataclass(frozen=True)
class Shape:
    patches: int
    sequences: tuple[tuple[str, int, int], ...]
    """(argument, number of sequences, patches of the longest): no less than what is computed."""


def shape_of(patches: int, sequences: dict[str, tuple[int, int]]) -> Shape:
    """The captured shape for a batch. ``sequences``: argument → (number, patches of the longest).

    Few shapes serve all batches, and what they compute in vain stays small: places without a
    sequence, or beyond its end, are left at once by the kernel.
    """
    filled = -(-patches // STEP) * STEP
    room = tuple(
        (
            name,
            _power(number + -(-(filled - patches) // min(longest, STEP)), 4),
            max(_power(longest, 64), _power(filled, 64) // 8 if name == "cu_seqlens" else 0),
        )
        for name, (number, longest) in sorted(sequences.items())
    )
    return Shape(filled, room)


def _power(number: int, least: int) -> int:
    """The power of two that is not less."""
    return max(least, 1 << (number - 1).bit_length())


@dataclass(frozen=True)
class _Captured:
    inputs: dict[str, Tensor]
    compute: Compute


class CapturedTower:
    """Takes the place of a packed tower's ``forward``. For one thread.

    What it returns is overwritten by its next call.
    """

    def __init__(self, tower: Module, merge: int, capture: Capture) -> None:
        """``merge``: patches of a row after merging."""
        self._forward = tower.forward
        self._merge = merge
        self._capture = capture
        self._seen: Counter[Shape] = Counter()
        self._graphs: dict[Shape, _Captured] = {}
        self._most_graphs = MOST_GRAPHS
        self._by_patch: dict[str, Tensor] = {}
        """Memory that all graphs read, each as much of it as it needs."""
        self._planes: list[Tensor] = []
        """What all graphs write, likewise: (rows, width) of each plane."""
        self._output: type[Any] = dict
        """The tower's own kind of answer."""

    def __call__(self, hidden_states: Tensor, **arguments: Any) -> Any:
        """As the tower's own, without hidden states. ``hidden_states``: (patches, ...) pixels."""
        graph = self._graph(hidden_states, arguments)
        if graph is None:
            return self._forward(hidden_states, **arguments)
        self._fill(graph.inputs, hidden_states, arguments)
        graph.compute()
        embedding, *deepstack = (p[: len(hidden_states) // self._merge] for p in self._planes)
        more = {"deepstack_features": deepstack} if deepstack else {}
        return self._output(pooler_output=embedding, **more)

    def _graph(self, pixels: Tensor, arguments: dict[str, Any]) -> _Captured | None:
        """The one for this batch, if it has or deserves one."""
        if len(pixels) > MOST_PATCHES or not arguments.keys() <= ARGUMENTS:
            return None
        shape = shape_of(
            len(pixels),
            {
                name: (len(arguments[name]) - 1, arguments[longest])
                for name, longest in ENDS.items()
                if name in arguments
            },
        )
        if shape not in self._graphs:
            self._seen[shape] += 1
            if self._seen[shape] <= SEEN or len(self._graphs) >= self._most_graphs:
                return None
            try:
                self._graphs[shape] = self._new(shape, pixels, arguments)
            except RuntimeError as exc:  # a device's way to say that there is no memory, among more
                self._most_graphs = len(self._graphs)
                logger.warning("no more forwards will be captured: %s", exc)
                return None
        return self._graphs[shape]

    def _new(self, shape: Shape, pixels: Tensor, arguments: dict[str, Any]) -> _Captured:
        began = time.perf_counter()
        inputs = self._inputs(shape, pixels, arguments)
        self._fill(inputs, pixels, arguments)
        given: dict[str, Any] = {n: value for n, value in inputs.items() if n != "pixels"}
        given |= {ENDS[name]: longest for name, _, longest in shape.sequences}
        given |= {name: arguments[name] for name in PASSED_ON if name in arguments}

        def compute() -> None:
            output = self._forward(inputs["pixels"], **given)
            self._keep([output.pooler_output, *(getattr(output, "deepstack_features", None) or ())])
            self._output = type(output)

        compute()  # loads every kernel and takes what memory is kept: a capture must not
        found = _Captured(inputs, self._capture(compute))
        logger.info(
            "captured the forward of %d patches in %.2f s, %d shapes so far",
            shape.patches,
            time.perf_counter() - began,
            len(self._graphs) + 1,
        )
        return found

    def _inputs(self, shape: Shape, pixels: Tensor, arguments: dict[str, Any]) -> dict[str, Tensor]:
        """The memory that the graph of ``shape`` reads."""
        by_patch = {"pixels": pixels, **{n: arguments[n] for n in BY_PATCH if n in arguments}}
        inputs = {}
        for name, value in by_patch.items():
            if name not in self._by_patch:
                self._by_patch[name] = value.new_zeros(MOST_PATCHES, *value.shape[1:])
            inputs[name] = self._by_patch[name][: shape.patches]
        for name, number, _ in shape.sequences:
            inputs[name] = torch.empty_like(arguments[name][:1]).repeat(number + 1)
        if ORDER in arguments:
            rows = shape.patches // self._merge
            inputs[ORDER] = torch.arange(rows, device=arguments[ORDER].device)
        return inputs

    def _fill(self, inputs: dict[str, Tensor], pixels: Tensor, arguments: dict[str, Any]) -> None:
        """Lay a batch where the graph reads it. Pixels and positions of others may stay behind it:
        they are valid ones."""
        patches, filled = len(pixels), len(inputs["pixels"])
        for name, memory in inputs.items():
            value = pixels if name == "pixels" else arguments[name]
            memory[: len(value)].copy_(value)
            rest = memory[len(value) :]
            if name in ENDS:
                # The patches behind the batch, in sequences no longer than its own.
                step = min(arguments[ENDS[name]], STEP)
                torch.arange(1, len(rest) + 1, out=rest)
                rest.mul_(step).add_(patches).clamp_(max=filled)
            elif name == ORDER:
                torch.arange(len(value), len(memory), out=rest)

    def _keep(self, planes: list[Tensor]) -> None:
        """The graphs' memory is one: what is in it is gone at the next capture or replay."""
        if not self._planes:
            rows = MOST_PATCHES // self._merge
            self._planes = [plane.new_empty(rows, *plane.shape[1:]) for plane in planes]
        for memory, plane in zip(self._planes, planes, strict=True):
            memory[: len(plane)].copy_(plane)


class CudaGraphs:
    """Captures for ``CapturedTower``; all graphs compute in one memory, one at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._failed: list[torch.cuda.CUDAGraph] = []
        """Graphs whose capture failed. To free one ends the process."""
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, compute: Compute) -> Compute:
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        self._failed.append(graph)
        # Other threads of this process go on using the device meanwhile.
        with torch.cuda.graph(
            graph,
            pool=self._pool,
            stream=self._stream,
            capture_error_mode="thread_local",
        ):
            compute()
        self._failed.remove(graph)
        return graph.replay
