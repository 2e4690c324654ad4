"""One item on its way from a draft to an embedding in a slot, as the service keeps it."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from triptych import wire
from triptych.encoder.preparation import Prepared, RawImage, RawVideo
from triptych.encoder.runner import BatchResult, Job
from triptych.errors import TriptychError
from triptych.request import ItemMeta, Span
from triptych.transfer.pool import Extent


@dataclass(frozen=True)
class Draft:
    """An item that is not in the pool: what it will be, and what it will cost."""

    meta: ItemMeta
    patches: int
    raw: RawImage | RawVideo


@dataclass
class Embedding:
    """One slot of the pool, from the answer to its eviction."""

    slot: int
    meta: ItemMeta
    extent: Extent
    patches: int
    cached: bool = False
    """Full; lent from the pool from now on."""
    failed: bool = False
    raw: RawImage | RawVideo | None = None
    """Until it is being prepared."""
    preparing: Future[Prepared] | None = None
    prepared: Prepared | None = None
    """Until it is encoded."""
    arrived: float = field(default_factory=time.time)
    """Wall-clock seconds."""
    waiters: list[tuple[str, int]] = field(default_factory=list)
    """(request id, item index) of those who are told how it went."""

    def job(self) -> Job:
        """For the forward; the item has been prepared."""
        assert self.prepared is not None, "an embedding was prepared before it was encoded"
        return Job(self.slot, self.prepared.inputs, self.extent.offset, self.meta.shape)

    def failures(self, error: TriptychError) -> list[wire.Failed]:
        """What the router is told about everyone who waits for this item."""
        return [
            wire.Failed(
                request_id=request,
                stage="encoder",
                error=type(error).__name__,
                reason=error.message,
                item=index,
                retryable=error.retryable,
            )
            for request, index in self.waiters
        ]

    def spans(self, result: BatchResult, index: int) -> list[Span]:
        """Where the time went, once the embedding is in its slot; for item ``index``."""
        prepared = self.prepared
        assert prepared is not None, "an embedding was prepared before it was encoded"
        steps = (
            ("queue", self.arrived, prepared.began, 0, "to be decoded"),
            ("decode", prepared.began, prepared.decoded, 0, ""),
            ("queue", prepared.decoded, prepared.preprocessing, 0, "preprocessed"),
            ("preprocess", prepared.preprocessing, prepared.preprocessed, 0, ""),
            ("queue", prepared.preprocessed, result.began, 0, "encoded"),
            ("encode", result.began, result.encoded, 0, f"batch of {len(result.slots)}"),
            ("ready", result.encoded, time.time(), self.meta.nbytes, ""),
        )
        return [
            Span(name=name, start=start, end=end, item=index, nbytes=nbytes, note=note)
            for name, start, end, nbytes, note in steps
        ]
