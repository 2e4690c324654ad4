"""Refs: what a producer hands over so that a consumer can fetch. They travel in control messages.

A ref is a name and a promise, not an address: the consumer claims it on the producer's channel
and learns there which pieces of the producer's pool to read.
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
