"""The model's own modules run on whole chunks: every picture and every sequence in one batch.

Transformers runs attention image by image and would run a branch at a time; here the same modules
are called on filled-up batches with masks. The results are equal (``tests/unit``), only faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen

from batches import GRIDS, PATCHES
from recipe import MERGE, TILES

Batch = dict[str, Tensor]


class Tables:
    """What depends on a picture's size alone, for every size in ``GRIDS``."""

    def __init__(self, model: Any, device: torch.device) -> None:
        visual = model.model.visual
        side = int(visual.config.num_position_embeddings**0.5)
        head = visual.config.hidden_size // visual.config.num_heads
        inverse = 1.0 / 10000.0 ** (torch.arange(0, head // 2, 2, dtype=torch.float) / (head // 2))
        corners, weights, angles, there = [], [], [], []
        for rows, columns in GRIDS:
            y, x = _patch_places(rows, columns)
            index, weight = _bilinear(y, x, rows * MERGE, columns * MERGE, side)
            turn = torch.cat([y[:, None] * inverse, x[:, None] * inverse], 1)
            n = len(y)
            corners.append(functional.pad(index, (0, 0, 0, PATCHES - n)))
            weights.append(functional.pad(weight, (0, 0, 0, PATCHES - n)))
            angles.append(functional.pad(torch.cat([turn, turn], 1), (0, 0, 0, PATCHES - n)))
            there.append(torch.arange(PATCHES) < n)
        self.corners = torch.stack(corners).to(device)
        """(grids, patches, 4) places in the table of learned positions, and their weights."""
        self.weights = torch.stack(weights).to(device)
        self.cos = torch.stack(angles).cos().to(device)
        """(grids, patches, head) as ``sin``."""
        self.sin = torch.stack(angles).sin().to(device)
        self.there = torch.stack(there).to(device)
        """(grids, patches) bool: the patch is one of the picture's."""


def _patch_places(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Row and column of every patch, in the order of the processor: tile after tile."""
    y, x = torch.meshgrid(torch.arange(rows * MERGE), torch.arange(columns * MERGE), indexing="ij")
    tiles = (rows, MERGE, columns, MERGE)
    return tuple(each.reshape(tiles).transpose(1, 2).flatten() for each in (y, x))  # type: ignore[return-value]


def _bilinear(y: Tensor, x: Tensor, high: int, wide: int, side: int) -> tuple[Tensor, Tensor]:
    """Four places each in a ``side`` by ``side`` table, corners aligned, and their weights."""
    index = torch.zeros(len(y), 1, dtype=torch.long)
    weight = torch.ones(len(y), 1)
    for at, size in ((y, high), (x, wide)):
        exact = at.float() * (side - 1) / max(size - 1, 1)
        low = exact.floor()
        places = torch.stack([low, (low + 1).clamp(max=side - 1)], 1).long()
        parts = torch.stack([1 - (exact - low), exact - low], 1)
        index = (index[:, :, None] * side + places[:, None]).flatten(1)
        weight = (weight[:, :, None] * parts[:, None]).flatten(1)
    return index, weight


def see(model: Any, tables: Tables, pixels: Tensor, grid: Tensor) -> list[Tensor]:
    """Embeddings of pictures: planes of (pictures, tiles, width). Rows of filling mean nothing.

    ``pixels``: (pictures, patches, 768) uint8; ``grid``: (pictures,) indices into ``GRIDS``.
    """
    visual = model.model.visual
    kernel = visual.patch_embed.proj
    # Both frames of a patch are the same picture.
    hidden = functional.linear(pixels.float() / 127.5 - 1.0, kernel.weight.sum(2).flatten(1))
    hidden = hidden + kernel.bias
    learned = (visual.pos_embed(tables.corners) * tables.weights[..., None]).sum(2)
    hidden = hidden + learned.index_select(0, grid)
    mask = tables.there[grid][:, None, None, :]
    cos, sin = tables.cos[grid], tables.sin[grid]
    deepstack = []
    for number, block in enumerate(visual.blocks):
        hidden = hidden + _attend(block.attn, block.norm1(hidden), cos, sin, mask)
        hidden = hidden + block.mlp(block.norm2(hidden))
        if number in visual.deepstack_visual_indexes:
            merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(number)]
            deepstack.append(merger(hidden))
    planes = [visual.merger(hidden), *deepstack]
    return [plane.view(len(pixels), TILES, -1) for plane in planes]


def _attend(attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    n, length, width = hidden.shape
    qkv = attention.qkv(hidden).view(n, length, 3, attention.num_heads, -1)
    query, key, value = qkv.unbind(2)
    query, key = qwen.apply_rotary_pos_emb_vision(query, key, cos, sin)
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    mask = mask.expand(n, 1, length, length)
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attention.proj(out.transpose(1, 2).reshape(n, length, width))


def answer_logits(model: Any, tables: Tables, batch: Batch) -> Tensor:
    """Logits of every learned token, (sequences, answer tokens, vocabulary)."""
    planes = see(model, tables, batch["pixels"], batch["grid"])
    language = model.model.language_model
    # Row 0 stands for text: nothing is added there.
    place = batch["image_row"] + 1
    rows = [
        functional.embedding(place, functional.pad(plane.flatten(0, 1), (0, 0, 1, 0)), 0)
        for plane in planes
    ]
    is_image = (place > 0)[..., None]
    hidden = torch.where(is_image, rows[0].float(), language.embed_tokens(batch["ids"]))
    position = batch["position"].transpose(0, 1)
    turned = language.rotary_emb(hidden, position)
    mask = _mask(batch["segment"])
    for number, layer in enumerate(language.layers):
        hidden = layer(hidden, position_embeddings=turned, attention_mask=mask)
        if number + 1 < len(rows):
            hidden = hidden + rows[number + 1]
    source = batch["source"][..., None].expand(-1, -1, hidden.shape[-1])
    logits: Tensor = model.lm_head(language.norm(hidden.gather(1, source)))
    return logits


def _mask(segment: Tensor) -> Tensor:
    """(sequences, 1, tokens, tokens) bool: who may look at whom."""
    length = segment.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
    query, key = segment[:, :, None], segment[:, None, :]
    return (before & ((key == 0) | (key == query)))[:, None]


def loss(model: Any, tables: Tables, batch: Batch) -> Tensor:
    """Mean cross-entropy of the answers' tokens."""
    logits = answer_logits(model, tables, batch).float()
    return functional.cross_entropy(
        logits.flatten(0, 1), batch["target"].flatten(), ignore_index=-1
    )
