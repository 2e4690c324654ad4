"""One attention call per layer for images (and windows) of different sizes in one forward.

Towers that pack all images into one row of patches run attention once per image, and once per
window, unless their attention is a variable-length one: then they hand over where each sequence
ends. Transformers tells the two apart by the word "flash" in the implementation's name.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.models.pixtral.modeling_pixtral import PixtralAttention

PACKED_ATTENTION = "triptych_flash_packed"
FUSED_DTYPES = (torch.float16, torch.bfloat16)


def pack_attention(model: Module) -> bool:
    """Give every attention module of ``model`` that takes packed sequences the one-call attention.

    False when there is none: such towers batch their crops, which is one call already.
    """
    packed = [module for module in model.modules() if _is_packed(module)]
    for module in packed:
        # ``set_attn_implementation`` refuses unknown names that have "flash" in them.
        config: Any = module.config
        config._attn_implementation = PACKED_ATTENTION
    return bool(packed)


def _is_packed(module: Module) -> bool:
    if isinstance(module, PixtralAttention):  # it passes on what its tower is told
        return True
    return (
        hasattr(module, "scaling") and "cu_seqlens" in inspect.signature(module.forward).parameters
    )


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Is there a variable-length kernel? It reads the sequences' ends on the device; without one
    they are read on the host."""
    return (
        device.type == "cuda"
        and dtype in FUSED_DTYPES
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _attention(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query, key, value: (1, heads, patches, head_dim). Returns (1, patches, heads, head_dim)."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    # The operation hides what it does from the compiler; without one it is a detour.
    attend = packed_attention if torch.compiler.is_compiling() else _packed_attention
    return attend(q, k, v, cu_seq_lens_q, max_length_q, scaling)[None], None


AttentionInterface.register(PACKED_ATTENTION, _attention)


def _packed_attention(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scaling: float
) -> Tensor:
    """Attention within each sequence of a packed row, in both directions.

    query, key, value: (patches, heads, head_dim). ``ends``: (sequences + 1,) int32, where each
    sequence starts and the last one ends (some may be empty); on the device if ``has_kernel``, else
    on the host. ``longest``: patches of the longest one. Returns (patches, heads, head_dim).
    """
    if has_kernel(query.device, query.dtype):
        # The kernel scales by head_dim ** -0.5; torch 2.11 has no argument for another factor.
        if scaling != query.shape[-1] ** -0.5:
            query = query * (scaling * query.shape[-1] ** 0.5)
        out = varlen_attn(query, key, value, ends, ends, longest, longest)
        assert isinstance(out, Tensor)
        return out.contiguous()
    return _by_length(query, key, value, tuple(ends.tolist()), scaling)


packed_attention = torch.library.custom_op(
    "triptych::packed_attention", _packed_attention, mutates_args=()
)


@packed_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scaling: float
) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _by_length(
    query: Tensor, key: Tensor, value: Tensor, ends: tuple[int, ...], scaling: float
) -> Tensor:
    """Without a kernel: the sequences of each length are one batch."""
    out = query.new_empty(query.shape)
    for length, rows in _rows_by_length(ends):
        index = rows if isinstance(rows, slice) else rows.to(query.device)
        q, k, v = (
            x[index].reshape(-1, length, *x.shape[1:]).transpose(1, 2) for x in (query, key, value)
        )
        part = scaled_dot_product_attention(q, k, v, scale=scaling)
        out[index] = part.transpose(1, 2).flatten(0, 1)
    return out


@lru_cache(maxsize=64)
def _rows_by_length(ends: tuple[int, ...]) -> list[tuple[int, slice | Tensor]]:
    """Length of a sequence → the rows of all sequences of that length, one after the other."""
    starts: defaultdict[int, list[int]] = defaultdict(list)
    for start, end in zip(ends, ends[1:], strict=False):
        if end > start:
            starts[end - start].append(start)
    found: list[tuple[int, slice | Tensor]] = []
    for length, first in starts.items():
        if first == list(range(first[0], first[0] + length * len(first), length)):
            found.append((length, slice(first[0], first[-1] + length)))
        else:
            rows = torch.tensor(first)[:, None] + torch.arange(length)
            found.append((length, rows.flatten()))
    return found


def ends_of(lengths: list[int]) -> Tensor:
    """(sequences + 1,) int32 on the host: where sequences of ``lengths`` start and end."""
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
