"""Refs: what a producer hands over so that a consumer can fetch. They travel in control messages.

A ref is a name and a promise, not an address: the consumer claims it on the producer's channel
and learns there which pieces of the producer's pool to read. What lies in the pieces of a
``KVRef`` is said once, at hello, by the ``KVLayout``.
"""

from __future__ import annotations

import msgspec


class Ref(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    owner: str
    """Base URL of the producer's control endpoint, as in ``http://127.0.0.1:8101``."""
    nonce: str
    """The producer process's nonce: one that came back on the same address has another."""
    slot: int
    generation: int
    """Grows each time the slot is given out: an old ref to a new tenant is refused."""
    nbytes: int


class EmbeddingRef(Ref, frozen=True, forbid_unknown_fields=True, tag="embedding"):
    key: str
    dtype: str
    shape: tuple[int, int, int]
    """(planes, rows, width), contiguous in one piece."""


class KVRef(Ref, frozen=True, forbid_unknown_fields=True, tag="kv"):
    n_tokens: int
    """Prompt tokens whose keys and values are handed over."""
    block_size: int
    """Tokens of a block."""
    block_nbytes: int
    """Bytes of a block across all layers: one piece each, in the order of the prompt."""


AnyRef = EmbeddingRef | KVRef


class KVLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How keys and values lie in a block: those who hand KV to each other must have one layout."""

    order: str
    """Axes from the outermost, as in "block,layer,kv,token,head,dim"."""
    block_size: int
    """Tokens of a block."""
    block_nbytes: int
    """Bytes of a block across all layers."""
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    tp_size: int
    """Ranks that the heads are spread over."""


def kv_mismatch(
    ours: KVLayout | None, name: str, theirs: KVLayout | None, their_name: str
) -> str | None:
    """In which fields two workers' layouts differ, both named; None when KV may move between
    them. A worker that hands no KV over has None, which agrees with everything."""
    if ours is None or theirs is None or ours == theirs:
        return None
    fields = [f for f in KVLayout.__struct_fields__ if getattr(ours, f) != getattr(theirs, f)]
    mine, other = (
        ", ".join(f"{field} {getattr(layout, field)}" for field in fields)
        for layout in (ours, theirs)
    )
    return f"the KV layout of {their_name} ({other}) is not that of {name} ({mine})"
