"""What a worker says of itself when it introduces itself. No torch, no sockets."""

from __future__ import annotations

import msgspec


class ModelIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Two workers may exchange embeddings or KV only if ``mismatch`` finds nothing."""

    name: str
    """What the operator called it; for messages, not compared: folders differ between hosts."""
    fingerprint: str
    """Hash of the configuration and of the weights; "" for the router, which needs none."""
    dtype: str
    """Of embeddings and KV; "" for the router, which holds neither."""
    processor: str
    """``Processor.backend`` (pixels of different ones differ); "" where none is used."""
    configuration: str = ""
    """Hash of the configuration alone."""
    revision: str = ""
    """Commit of the checkpoint on the hub; for messages: ``fingerprint`` covers it."""


def mismatch(ours: ModelIdentity, theirs: ModelIdentity) -> str | None:
    """Why the two cannot work together, both named; None when they can."""
    for what in ("configuration", "fingerprint", "dtype", "processor"):
        mine, other = getattr(ours, what), getattr(theirs, what)
        if mine and other and mine != other:
            return f"{what} {other} of {theirs.name!r} is not {mine} of {ours.name!r}"
    return None


class Capacity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What placement needs to know of a worker."""

    pool_nbytes: int = 0
    kv_blocks: int = 0
    block_size: int = 0
    max_model_len: int = 0

    @property
    def kv_tokens(self) -> int:
        return self.kv_blocks * self.block_size


class TransportOffer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a producer's pool can be reached by one transport."""

    kind: str
    host: str
    """Boot id of the producer's host: equal means the same machine."""
    address: str
    """Unix socket (shm), ``host:port`` of the session (mooncake), base URL (http)."""
    base: int = 0
    """Address of the pool's first byte, where the transport needs one."""
    nbytes: int = 0
    """Size of the pool."""
    protocol: str = ""
    """What the bytes move by where the kind leaves it open: "nvlink", "rdma", "tcp" (mooncake),
    "staged" (shm, when the memory is a GPU's)."""
    rank: int = 0
    """Whose pool, where the producer is several ranks; its own is the first."""
