"""Attention over the paged KV cache, called by the model's own layers.

The model's decoder runs on one flattened batch, ``(1, tokens)``: first one token of each decoding
sequence, then prompt chunks. Transformers passes a ``Context`` through to this function and builds
no mask, because none is registered under its name: causality and sliding windows are ours.
Everything that does not depend on the layer is computed once per step.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from triptych.engine.copies import Mark, to_device
from triptych.engine.kv_cache import KVCache
from triptych.engine.sequence import Run
from triptych.errors import UnsupportedModel
from triptych.models.language import PAGED_ATTENTION

Window = int | None
"""A query sees this many tokens back, itself included; None: all."""


@dataclass(slots=True)
class DecodeBatch:
    """One new token of each of several sequences."""

    planes: Tensor
    """Where keys and values lie, as from ``KVCache.planes``: of as many blocks for each sequence;
    a short one's are padded with blocks of its own."""
    kv_lens: Tensor
    """(sequences,) tokens with KV, the new one included."""
    n_slots: int
    """Tokens that each sequence's blocks have room for."""
    masks: dict[Window, Tensor] = field(default_factory=dict)

    def mask(self, window: Window) -> Tensor:
        """(sequences, 1, 1, n_slots) bool."""
        if window not in self.masks:
            token = torch.arange(self.n_slots, device=self.kv_lens.device)
            ends = self.kv_lens[:, None]
            mask = token < ends
            if window is not None:
                mask &= token >= ends - window
            self.masks[window] = mask[:, None, None]
        return self.masks[window]


@dataclass(slots=True)
class Chunk:
    """Tokens ``start .. stop`` of one prompt."""

    planes: Tensor
    """Where keys and values of tokens ``0 .. stop`` lie, as from ``KVCache.planes``."""
    start: int
    stop: int
    runs: tuple[Run, ...] = ()
    """Of tokens that attend to each other in both directions; none ends behind ``stop``."""
    masks: dict[Window, Tensor | None] = field(default_factory=dict)

    def mask(self, window: Window) -> Tensor | None:
        """(stop - start, stop) bool; None where plain causality is meant."""
        if window not in self.masks:
            self.masks[window] = self._mask(window)
        return self.masks[window]

    def _mask(self, window: Window) -> Tensor | None:
        if self.start == 0 and not self.runs and (window is None or window >= self.stop):
            return None
        token = torch.arange(self.stop, device=self.planes.device)
        query = token[self.start :, None]
        mask = token <= query
        for first, last in self.runs:
            mask[max(first - self.start, 0) : last - self.start, first:last] = True
        return mask if window is None else mask & (token > query - window)


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens ``start .. stop`` of the sequence at ``place`` of the block tables."""

    place: int
    start: int
    stop: int
    runs: tuple[Run, ...] = ()
    """See ``Chunk``."""


class Context(Protocol):
    """One step's attention, as the model's layers meet it."""

    def attend(
        self,
        module: Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: Window,
    ) -> Tensor:
        """Write the step's keys and values, then attend to all of each sequence's.

        ``query``: (1, heads, tokens, dim), ``key`` and ``value``: (1, kv_heads, tokens, dim).
        Returns (tokens, heads, dim).
        """


class Attention(Protocol):
    """How attention over the paged cache is computed. Owns the block tables."""

    @property
    def nearly(self) -> Mark | None:
        """A point shortly before the end of the last forward, where it can be told."""

    def place(self, place: int, blocks: Seq[int], computed: int) -> None:
        """A sequence has these blocks from now on; those behind ``computed`` tokens are new."""

    def extend(self, place: int, blocks: Seq[int]) -> None:
        """The sequence has these blocks as well, all of them new."""

    def plan(self, parts: Seq[Part], n_decodes: int) -> Context:
        """For one forward of these tokens, the first ``n_decodes`` parts of one token each."""


@dataclass(frozen=True, slots=True)
class StepContext:
    """One step by torch's own attention, sequence by sequence: the reference for any other."""

    kv: KVCache
    slots: Tensor
    """(tokens,) slot of each token of the flattened batch."""
    decodes: DecodeBatch | None
    """The first tokens of the batch, one of each sequence."""
    n_decodes: int
    chunks: tuple[Chunk, ...]
    """The other tokens, chunk after chunk."""

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
        layer = module.layer_idx
        assert isinstance(layer, int)
        self.kv.write(layer, self.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        parts = []
        if self.decodes is not None:
            part = query[0, :, : self.n_decodes].transpose(0, 1).unsqueeze(2)
            parts.append(_decode(self, layer, part, scaling, window))
        first = self.n_decodes
        for chunk in self.chunks:
            last = first + chunk.stop - chunk.start
            parts.append(_chunk(self, chunk, layer, query[:, :, first:last], scaling, window))
            first = last
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class SdpaAttention:
    """``places``: most sequences with a table; ``max_blocks``: most blocks of a sequence."""

    nearly: Mark | None = None
    """See ``Attention``."""

    def __init__(self, kv: KVCache, places: int, max_blocks: int) -> None:
        self._kv = kv
        self._tables = torch.zeros(places, max_blocks, dtype=torch.int64, device=kv.device)
        self._blocks: list[list[int]] = [[] for _ in range(places)]

    def place(self, place: int, blocks: Seq[int], computed: int) -> None:
        """See ``Attention``."""
        self._blocks[place] = list(blocks)
        row = torch.tensor(self._blocks[place], device=self._kv.device)
        self._tables[place] = row[-1]  # padding reads the sequence's own memory
        self._tables[place, : len(row)] = row
        self._kv.clear(self._blocks[place][-(-computed // self._kv.block_size) :])

    def extend(self, place: int, blocks: Seq[int]) -> None:
        """See ``Attention``."""
        held = self._blocks[place]
        row = torch.tensor(blocks, device=self._kv.device)
        self._tables[place, len(held) :] = row[-1]
        self._tables[place, len(held) : len(held) + len(row)] = row
        held.extend(blocks)
        self._kv.clear(blocks)

    def plan(self, parts: Seq[Part], n_decodes: int) -> StepContext:
        """See ``Attention``."""
        slots: list[Tensor] = []
        decodes = self._decodes(parts[:n_decodes], slots) if n_decodes else None
        chunks = tuple(self._chunk(part, slots) for part in parts[n_decodes:])
        return StepContext(self._kv, torch.cat(slots), decodes, n_decodes, chunks)

    def _decodes(self, parts: Seq[Part], slots: list[Tensor]) -> DecodeBatch:
        size = self._kv.block_size
        columns = [
            (
                self._kv.slot(self._blocks[part.place][part.start // size], part.start % size),
                part.stop,
                part.place,
            )
            for part in parts
        ]
        own, kv_lens, places = to_device(columns, self._kv.device).T
        slots.append(own)
        n_blocks = max(part.start for part in parts) // size + 1
        table = self._tables[:, :n_blocks].index_select(0, places)
        return DecodeBatch(self._kv.planes(table.flatten()), kv_lens, n_blocks * size)

    def _chunk(self, part: Part, slots: list[Tensor]) -> Chunk:
        size = self._kv.block_size
        table = self._tables[part.place, : (part.stop - 1) // size + 1]
        first = part.start // size
        offset = part.start - first * size
        own = self._kv.slots(table[first:])[offset : offset + part.stop - part.start]
        slots.append(own)
        return Chunk(self._kv.planes(table), part.start, part.stop, part.runs)


def paged_attention(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    context: Context,
    scaling: float | None = None,
    sliding_window: Window = None,
    **others: object,
) -> tuple[Tensor, None]:
    """What the model's layers call; see ``Context.attend``.

    Keys and queries are rotated and normalised by the layer. Returns (1, tokens, heads, dim).
    Raises UnsupportedModel for variants of attention that no context computes.
    """
    if others.get("softcap") is not None or others.get("s_aux") is not None:
        raise UnsupportedModel("attention with soft capping or sinks is not supported")
    return context.attend(module, query, key, value, scaling, sliding_window).unsqueeze(0), None


def _decode(
    context: StepContext, layer: int, query: Tensor, scaling: float | None, window: Window
) -> Tensor:
    """``query``: (sequences, heads, 1, dim). Returns (sequences, heads, dim)."""
    batch = context.decodes
    assert batch is not None
    n, heads, _, dim = query.shape
    key, value = context.kv.read(batch.planes[layer]).view(2, n, batch.n_slots, -1, dim)
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    # The query heads of a group are one head's queries: all see the same tokens.
    groups = query.reshape(n, key.shape[1], -1, dim)
    attended = scaled_dot_product_attention(
        groups, key, value, attn_mask=batch.mask(window), scale=scaling
    )
    return attended.reshape(n, heads, dim)


def _chunk(
    context: StepContext,
    chunk: Chunk,
    layer: int,
    query: Tensor,
    scaling: float | None,
    window: Window,
) -> Tensor:
    """``query``: (1, heads, tokens, dim). Returns (tokens, heads, dim)."""
    key, value = context.kv.read(chunk.planes[layer])[:, None, : chunk.stop].transpose(2, 3)
    mask = chunk.mask(window)
    attended = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended[0].transpose(0, 1)


AttentionInterface.register(PAGED_ATTENTION, paged_attention)
