"""One step of the model: from work to tokens. Holds what the device needs of each request."""

from __future__ import annotations

import time
from array import array
from bisect import bisect_left
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from triptych.engine.attention import Attention, Part
from triptych.engine.copies import Mark, to_device
from triptych.engine.sampler import Draw, Sampled, Samples, sample
from triptych.engine.sequence import ItemSpan, Sequence
from triptych.engine.work import Work
from triptych.errors import TransferFailed
from triptych.models.language import LanguageModel
from triptych.models.stream import drain

if TYPE_CHECKING:  # only on CUDA is it there to be imported
    from triptych.engine.graphs import DecodeGraphs


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt on the device."""

    ids: Tensor
    """(tokens,) int64."""
    positions: Tensor
    """(axes, tokens) int64."""
    next_position: int
    """Position id of the answer's first token, equal on every axis."""
    row_positions: list[int]
    """Tokens at which rows stand, of all images in order."""
    row_index: Tensor
    """The same as (rows,) int64."""
    first_rows: list[int]
    """Number of the first row of each image, and the number of all rows."""
    n_answered: int = 0
    """Tokens of the answer behind the prompt."""
    landed: dict[int, Tensor] = field(default_factory=dict)
    """By image: (planes, rows, width)."""

    @classmethod
    def build(
        cls,
        model: LanguageModel,
        token_ids: Seq[int],
        spans: Seq[ItemSpan],
        row_positions: list[int],
        resumed: Seq[int] = (),
    ) -> Prompt:
        """``row_positions`` as from ``locate_items``; ``resumed``: tokens of the answer to compute
        behind the prompt. Raises BadRequest if the items' grids do not agree with the tokens."""
        grids: dict[str, list[tuple[int, int, int]]] = {"image": [], "video": []}
        for span in spans:
            if span.grid is not None:
                grids[span.kind].append(span.grid)
        seconds = [s.second_per_grid for s in spans if s.second_per_grid is not None]
        ids = torch.frombuffer(array("q", token_ids), dtype=torch.int64)
        positions, next_position = model.positions(ids, grids["image"], grids["video"], seconds)
        prompt = cls(
            ids=ids.to(model.device),
            positions=positions.to(model.device),
            next_position=next_position,
            row_positions=row_positions,
            row_index=torch.from_numpy(np.array(row_positions, np.int64)).to(model.device),
            first_rows=[0, *accumulate(span.rows for span in spans)],
        )
        return prompt.answered(resumed)

    def answered(self, answer: Seq[int]) -> Prompt:
        """With all of the answer's tokens behind it, of which it may have the first already."""
        new = answer[self.n_answered :]
        device, first = self.ids.device, self.next_position + self.n_answered
        positions = torch.arange(first, first + len(new), device=device)
        return replace(
            self,
            ids=torch.cat([self.ids, torch.tensor(new, dtype=torch.int64, device=device)]),
            positions=torch.cat([self.positions, positions.expand(len(self.positions), -1)], 1),
            n_answered=len(answer),
        )

    def rows(self, first: int, last: int) -> Tensor:
        """Rows ``first .. last`` of all images, (planes, last - first, width)."""
        parts = []
        for item, rows in self.landed.items():
            start, stop = self.first_rows[item], self.first_rows[item + 1]
            if start < last and first < stop:
                parts.append((start, rows[:, max(first, start) - start : min(last, stop) - start]))
        parts.sort(key=lambda part: part[0])
        return torch.cat([rows for _, rows in parts], 1)


@dataclass(slots=True)
class _Table:
    """What ``attention`` has been told of a sequence."""

    place: int
    n_blocks: int


@dataclass(slots=True)
class _Batch:
    """The flattened step while it is put together."""

    ids: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    row_targets: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    n_decodes: int = 0


@dataclass(frozen=True, slots=True)
class Launched:
    """A step that the device has been given."""

    work: tuple[Work, ...]
    started: float
    """Wall-clock seconds."""
    samples: Samples | None
    """None: nothing samples."""
    mark: Mark
    nearly: Mark | None
    """Shortly before its end, where that can be told."""

    def ids(self, decodes: Seq[Work]) -> Tensor:
        """(decodes,) int64: the tokens that it samples for these sequences, on the device."""
        assert self.samples is not None
        sampling = [w.sequence for w in self.work if w.samples]
        following = [w.sequence for w in decodes]
        if following == sampling:
            return self.samples.tokens
        rows = {sequence: row for row, sequence in enumerate(sampling)}
        chosen = to_device([rows[each] for each in following], self.samples.tokens.device)
        return self.samples.tokens.index_select(0, chosen)


class Runner:
    """``places``: most sequences of a step, each with a place in ``attention``'s tables."""

    def __init__(self, model: LanguageModel, attention: Attention, places: int) -> None:
        self.graphs: DecodeGraphs | None = None
        """Captured decode steps, if there are any."""
        self._model = model
        self._attention = attention
        self._device = model.device
        self._prompts: dict[str, Prompt] = {}
        self._free_places = list(range(places))
        self._tables: dict[str, _Table] = {}

    # -------------------------------------------------------------- requests

    def add(self, request_id: str, prompt: Prompt) -> None:
        self._prompts[request_id] = prompt

    def land(self, request_id: str, item: int, rows: Tensor) -> None:
        """``rows``: (planes, rows, width). Raises TransferFailed if that is not their shape."""
        prompt = self._prompts[request_id]
        n_rows = prompt.first_rows[item + 1] - prompt.first_rows[item]
        planes = self._model.planes
        expected = (planes, n_rows, self._model.hidden_size)
        if tuple(rows.shape) != expected:
            raise TransferFailed(
                f"the embedding of image {item} has shape {tuple(rows.shape)}, not {expected}",
                item=item,
            )
        prompt.landed[item] = rows

    def drop_rows(self, request_id: str, item: int) -> None:
        """The image's rows are not needed any more."""
        self._prompts[request_id].landed.pop(item, None)

    def preempt(self, request_id: str, answer: Seq[int]) -> None:
        """Its blocks are gone: it will be computed again from its first token, in others, and the
        answer so far with its prompt."""
        self._prompts[request_id] = self._prompts[request_id].answered(answer)
        self._leave_place(request_id)

    def forget(self, request_id: str) -> None:
        """Nothing more is computed for the request. Idempotent."""
        self._prompts.pop(request_id, None)
        self._leave_place(request_id)

    def let_go(self) -> None:
        """Of captured steps, after the last. Those of several ranks hold the ranks' communicator,
        whose end waits for theirs."""
        if self.graphs is not None and drain(self._device):
            self.graphs.release()
        self.graphs = None

    def _leave_place(self, request_id: str) -> None:
        table = self._tables.pop(request_id, None)
        if table is not None:
            self._free_places.append(table.place)

    # -------------------------------------------------------------- a step

    @torch.inference_mode()
    def warm_up(self, n_tokens: int, block_size: int) -> None:
        """Before any request: the model on ``n_tokens`` tokens, in the cache's first blocks."""
        self._attention.place(0, range(-(-n_tokens // block_size)), n_tokens)
        token = torch.zeros(n_tokens, dtype=torch.int64, device=self._device)
        batch = _Batch([token], [token.expand(self._model.axes, -1)], [Part(0, 0, n_tokens)])
        self._model.logits(self._forward(batch)[-1:])

    @torch.inference_mode()
    def launch(self, work: tuple[Work, ...], after: Launched | None = None) -> Launched:
        """One forward, of which nothing need be computed when this returns.

        ``work``: decodes first. ``after``: the step that samples the ids of these; None: they are
        known.
        """
        started = time.time()
        logits = self.logits(work, after)
        samples = None
        if logits is not None:
            draws = [
                Draw(w.sequence.sampling, len(w.sequence.output) + w.ahead)
                for w in work
                if w.samples
            ]
            samples = sample(logits, draws)
        return Launched(work, started, samples, Mark(self._device), self._attention.nearly)

    def read(self, step: Launched) -> list[Sampled]:
        """Wait for the step, but not for what was launched behind it: its keys and values are
        computed. A token for each entry of its work that samples, in order."""
        step.mark.wait()
        return step.samples.read() if step.samples is not None else []

    @torch.inference_mode()
    def logits(self, work: Seq[Work], after: Launched | None = None) -> Tensor | None:
        """(rows, vocabulary) float32, a row for each entry of ``work`` that samples, or None. Valid
        until this is called again. ``after``: as for ``launch``."""
        batch = _Batch()
        decodes = [w for w in work if w.is_decode]
        if self.graphs is not None and len(decodes) == len(work) <= self.graphs.most:
            return self._captured(self.graphs, decodes, after)
        if decodes:
            self._add_decodes(batch, decodes, after)
        first = len(decodes)
        for w in work[len(decodes) :]:
            self._add_chunk(batch, w, first)
            first += w.stop - w.start
        hidden = self._forward(batch)

        ends = accumulate(w.stop - w.start for w in work)
        rows = [end - 1 for w, end in zip(work, ends, strict=True) if w.samples]
        if not rows:
            return None
        if len(rows) < len(hidden):
            hidden = hidden.index_select(0, to_device(rows, self._device))
        return self._model.logits(hidden)

    def _captured(self, graphs: DecodeGraphs, decodes: Seq[Work], after: Launched | None) -> Tensor:
        positions = [w.sequence.last_position + w.ahead for w in decodes]
        return graphs.logits(self._ids(decodes, after), positions, self._parts(decodes))

    def _forward(self, batch: _Batch) -> Tensor:
        """(tokens, width)."""
        embeds = self._model.embed(torch.cat(batch.ids))
        visual_mask, deepstack = None, None
        if batch.rows:
            targets = torch.cat(batch.row_targets)
            planes = torch.cat(batch.rows, 1).to(self._device, embeds.dtype)
            embeds = embeds.index_copy(0, targets, planes[0])
            if len(planes) > 1:
                visual_mask = torch.zeros(len(embeds), dtype=torch.bool, device=self._device)
                visual_mask.index_fill_(0, targets, True)
                deepstack = list(planes[1:])
        context = self._attention.plan(batch.parts, batch.n_decodes)
        positions = torch.cat(batch.positions, 1)
        return self._model.forward(
            embeds, positions, context, visual_mask=visual_mask, deepstack=deepstack
        )

    def _add_decodes(self, batch: _Batch, decodes: Seq[Work], after: Launched | None) -> None:
        positions = [w.sequence.last_position + w.ahead for w in decodes]
        batch.n_decodes = len(decodes)
        batch.parts += self._parts(decodes)
        batch.ids.append(self._ids(decodes, after))
        batch.positions.append(to_device(positions, self._device).expand(self._model.axes, -1))

    def _ids(self, decodes: Seq[Work], after: Launched | None) -> Tensor:
        """(decodes,) int64, the newest token of each."""
        if after is not None:
            return after.ids(decodes)
        return to_device([w.sequence.output[-1] for w in decodes], self._device)

    def _parts(self, decodes: Seq[Work]) -> list[Part]:
        return [Part(self._place(w.sequence), w.start, w.stop) for w in decodes]

    def _add_chunk(self, batch: _Batch, work: Work, first: int) -> None:
        """``first``: the flattened batch's row of the chunk's first token."""
        prompt = self._prompts[work.sequence.request_id]
        start, stop = work.start, work.stop
        runs = tuple(run for run in work.sequence.runs if run[0] < stop and start < run[1])
        batch.parts.append(Part(self._place(work.sequence), start, stop, runs))
        batch.ids.append(prompt.ids[start:stop])
        batch.positions.append(prompt.positions[:, start:stop])
        row, last_row = (bisect_left(prompt.row_positions, token) for token in (start, stop))
        if row < last_row:
            batch.row_targets.append(prompt.row_index[row:last_row] + (first - start))
            batch.rows.append(prompt.rows(row, last_row))

    def _place(self, sequence: Sequence) -> int:
        """The sequence's place in the block tables, given when it is first computed. The table
        follows the sequence's blocks, which only become more."""
        blocks = sequence.blocks
        table = self._tables.get(sequence.request_id)
        if table is None:
            table = _Table(self._free_places.pop(), len(blocks))
            self._tables[sequence.request_id] = table
            self._attention.place(table.place, blocks, sequence.computed)
        elif table.n_blocks < len(blocks):
            self._attention.extend(table.place, blocks[table.n_blocks :])
            table.n_blocks = len(blocks)
        return table.place
