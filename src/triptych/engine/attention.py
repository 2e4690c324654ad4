"""Attention over the paged KV cache, called by the model's own layers.

The model's decoder runs on one flattened batch, ``(1, tokens)``: first one token of each decoding
sequence, then prompt chunks. Transformers passes ``StepContext`` through to this function and
builds no mask, because none is registered under its name: causality and sliding windows are ours.
Everything that does not depend on the layer is computed once per step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from triptych.engine.kv_cache import KVCache
from triptych.errors import UnsupportedModel
from triptych.models.language import PAGED_ATTENTION

Window = int | None
"""A query sees this many tokens back, itself included; None: all."""


@dataclass(slots=True)
class DecodeBatch:
    """One new token of each of several sequences."""

    table: Tensor
    """(sequences, n) blocks; a row is padded with blocks of the same sequence."""
    kv_lens: Tensor
    """(sequences,) tokens with KV, the new one included."""
    n_slots: int
    """Tokens that a row of ``table`` has room for."""
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

    table: Tensor
    """(1, n) blocks of tokens ``0 .. stop``."""
    start: int
    stop: int
    masks: dict[Window, Tensor | None] = field(default_factory=dict)

    def mask(self, window: Window) -> Tensor | None:
        """(stop - start, stop) bool; None where plain causality is meant."""
        if window not in self.masks:
            self.masks[window] = self._mask(window)
        return self.masks[window]

    def _mask(self, window: Window) -> Tensor | None:
        if self.start == 0 and (window is None or window >= self.stop):
            return None
        token = torch.arange(self.stop, device=self.table.device)
        query = token[self.start :, None]
        mask = token <= query
        return mask if window is None else mask & (token > query - window)


@dataclass(frozen=True, slots=True)
class StepContext:
    """What attention needs of one step."""

    kv: KVCache
    slots: Tensor
    """(tokens,) slot of each token of the flattened batch."""
    decodes: DecodeBatch | None
    """The first tokens of the batch, one of each sequence."""
    n_decodes: int
    chunks: tuple[Chunk, ...]
    """The other tokens, chunk after chunk."""


def paged_attention(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    context: StepContext,
    scaling: float | None = None,
    sliding_window: Window = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Write the step's keys and values, then attend to all of each sequence's.

    ``query``: (1, heads, tokens, dim), ``key`` and ``value``: (1, kv_heads, tokens, dim), rotated
    and normalised by the layer. Returns (1, tokens, heads, dim). Raises UnsupportedModel for
    variants of attention that this function does not compute.
    """
    if others.get("softcap") is not None or others.get("s_aux") is not None:
        raise UnsupportedModel("attention with soft capping or sinks is not supported")
    layer = module.layer_idx
    assert isinstance(layer, int)
    context.kv.write(layer, context.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    parts = []
    if context.decodes is not None:
        part = query[0, :, : context.n_decodes].transpose(0, 1).unsqueeze(2)
        parts.append(_decode(context, layer, part, scaling, sliding_window))
    first = context.n_decodes
    for chunk in context.chunks:
        last = first + chunk.stop - chunk.start
        parts.append(
            _chunk(context, chunk, layer, query[:, :, first:last], scaling, sliding_window)
        )
        first = last
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0), None


def _decode(
    context: StepContext, layer: int, query: Tensor, scaling: float | None, window: Window
) -> Tensor:
    """``query``: (sequences, heads, 1, dim). Returns (sequences, heads, dim)."""
    batch = context.decodes
    assert batch is not None
    key, value = context.kv.gather(layer, batch.table)
    attended = scaled_dot_product_attention(
        query,
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=batch.mask(window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[2],
    )
    return attended.squeeze(2)


def _chunk(
    context: StepContext,
    chunk: Chunk,
    layer: int,
    query: Tensor,
    scaling: float | None,
    window: Window,
) -> Tensor:
    """``query``: (1, heads, tokens, dim). Returns (tokens, heads, dim)."""
    key, value = context.kv.gather(layer, chunk.table)
    mask = chunk.mask(window)
    attended = scaled_dot_product_attention(
        query,
        key[:, : chunk.stop].transpose(1, 2),
        value[:, : chunk.stop].transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[2],
    )
    return attended[0].transpose(0, 1)


AttentionInterface.register(PAGED_ATTENTION, paged_attention)
