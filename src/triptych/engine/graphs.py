"""Decode steps captured as CUDA graphs: one for each size of batch that is worth its own."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.engine.attention import Part
from triptych.engine.copies import locked
from triptych.engine.flash_attention import CONTEXT, FlashAttention
from triptych.engine.flash_steps import DecodeStep
from triptych.models.language import LanguageModel
from triptych.models.stream import URGENT


def buckets(most: int) -> list[int]:
    """Sizes of batch up to ``most``: powers of two, from 32 on multiples of 16."""
    sizes = {1, 2, 4, 8, 16, *range(32, most, 16), most}
    return sorted(size for size in sizes if size <= most)


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    step: DecodeStep
    logits: Tensor
    """(size, vocabulary) float32, overwritten by every replay."""


class DecodeGraphs:
    """Captures on construction, on the thread that will replay. The model has run before.

    ``foresees``: the next step is planned as soon as one is launched, not when it is launched
    itself. Of use where that happens when the first is over.
    """

    @torch.inference_mode()
    def __init__(
        self, model: LanguageModel, attention: FlashAttention, most: int, *, foresees: bool
    ) -> None:
        self._model = model
        self._foresees = foresees
        self._attention = attention
        self.most = most
        self._sizes = buckets(most)
        self._inputs = torch.zeros(2, most, dtype=torch.int64, device=model.device)
        """Ids and positions."""
        self._captured: dict[int, _Captured] = {}
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self._sizes):  # small ones fit the memory of large ones
            step = DecodeStep(attention, size)
            self._captured[size] = self._capture(size, step, pool)

    def logits(self, ids: Tensor, positions: Seq[int], parts: Seq[Part]) -> Tensor:
        """(sequences, vocabulary) float32, valid until the next call. ``ids``: (sequences,) int64
        on the device; ``parts``: ``most`` at most, of one token each.

        Nothing here waits for the device to have computed an earlier step.
        """
        n = len(parts)
        captured = self._captured[self._sizes[bisect_left(self._sizes, n)]]
        captured.step.load(parts)
        self._inputs[0, :n].copy_(ids)
        self._inputs[1, :n].copy_(locked(torch.tensor(positions), ids.device), non_blocking=True)
        captured.graph.replay()
        if self._foresees:
            captured.step.foresee(parts)
        return captured.logits[:n]

    def release(self) -> None:
        """What the graphs hold, now and not when they are collected: the end of a communicator
        waits for every graph that has captured it. None computes any more, or ever will."""
        while self._captured:
            self._captured.popitem()[1].graph.reset()

    def _capture(self, size: int, step: DecodeStep, pool: object) -> _Captured:
        step.load(())
        stream = torch.cuda.Stream(self._model.device, priority=URGENT)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._model.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._compute(size, step)
        torch.cuda.synchronize(self._model.device)
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process go on using the device meanwhile.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):  # type: ignore[arg-type]
            logits = self._compute(size, step)
        return _Captured(graph, step, logits)

    def _compute(self, size: int, step: DecodeStep) -> Tensor:
        self._attention.enter(step)
        ids, positions = self._inputs[0, :size], self._inputs[1:, :size]
        hidden = self._model.forward(
            self._model.embed(ids), positions.expand(self._model.axes, -1), CONTEXT
        )
        return self._model.logits(hidden)
