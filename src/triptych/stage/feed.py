"""Brings the embeddings of a request to the engine, one image at a time.

For each image: room in the landing area, then a pull from its encoder, then the rows go to the
engine as a view of the landing area. The engine says when it has used (or dropped) them, and the
room is free again. Room is taken in the order of the requests and of their images, so that nobody
waits for room that is held by somebody who waits for him.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

import torch

from triptych import wire
from triptych.config import Timeouts
from triptych.engine.loop import Engine
from triptych.engine.messages import ItemLanded
from triptych.errors import PeerRefused, TransferFailed, TriptychError
from triptych.request import Span
from triptych.transfer.consumer import Consumer
from triptych.transfer.pool import Extent, Pool
from triptych.transfer.region import BaseRegion

logger = logging.getLogger(__name__)
OnFailed = Callable[[str, TriptychError], None]
OnSpans = Callable[[str, Sequence[Span]], None]


class EmbeddingFeed:
    """Owner of the landing area's extents. Every method runs on the event loop."""

    def __init__(
        self,
        consumer: Consumer,
        region: BaseRegion,
        landing: Pool,
        engine: Engine,
        timeouts: Timeouts,
        *,
        on_failed: OnFailed,
        on_spans: OnSpans,
    ) -> None:
        self._consumer = consumer
        self._region = region
        self._landing = landing
        self._engine = engine
        self._timeouts = timeouts
        self._on_failed = on_failed
        self._on_spans = on_spans
        self._turn = asyncio.Lock()
        """Held by the request that takes room. The engine admits requests in the same order, so
        whoever holds room is, or will be, ahead of whoever waits for it."""
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._extents: dict[tuple[str, int], Extent] = {}
        """Rows that the engine holds."""

    def check(self, items: Sequence[wire.PrefillItem]) -> None:
        """Raises PeerRefused when an item's rows do not fit this worker's model."""
        dtype = str(self._engine.model.dtype).removeprefix("torch.")
        for index, item in enumerate(items):
            meta, ref = item.meta, item.ref
            if (ref.shape, ref.dtype, ref.nbytes) != (meta.shape, meta.dtype, meta.nbytes):
                raise PeerRefused(f"image {index + 1}: ref and metadata disagree", item=index)
            if meta.dtype != dtype or meta.width != self._engine.model.hidden_size:
                raise PeerRefused(
                    f"image {index + 1}: rows of {meta.width} {meta.dtype}, the model takes "
                    f"{self._engine.model.hidden_size} {dtype}",
                    item=index,
                )

    def start(self, request_id: str, items: Sequence[wire.PrefillItem]) -> None:
        if items:
            task = asyncio.create_task(self._bring_all(request_id, tuple(items)))
            self._tasks[request_id] = task
            task.add_done_callback(lambda _: self._tasks.pop(request_id, None))

    def cancel(self, request_id: str) -> None:
        """Stop what is under way; rows the engine holds come back through ``consumed``."""
        if task := self._tasks.pop(request_id, None):
            task.cancel()

    def consumed(self, request_id: str, item: int) -> None:
        """The engine will not touch these rows again."""
        if extent := self._extents.pop((request_id, item), None):
            self._landing.free(extent)

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _bring_all(self, request_id: str, items: tuple[wire.PrefillItem, ...]) -> None:
        room: dict[int, Extent] = {}
        try:
            async with asyncio.TaskGroup() as pulls, self._turn:
                for index, item in enumerate(items):
                    room[index] = await self._landing.allocate(
                        item.meta.nbytes, self._timeouts.pool
                    )
                    pulls.create_task(self._bring(request_id, index, item, room))
        except* TriptychError as group:
            self._on_failed(request_id, first_error(group))
        finally:
            # What is left was cancelled; a pull that is cancelled ends when nothing can be
            # written to its destination any more.
            for extent in room.values():
                self._landing.free(extent)

    async def _bring(
        self, request_id: str, index: int, item: wire.PrefillItem, room: dict[int, Extent]
    ) -> None:
        asked = time.time()
        offset = room[index].offset
        try:
            pulled = await self._consumer.pull(
                item.ref,
                request_id,
                place=lambda first, pieces: [offset],
                landed=lambda first, count, ready: None,
                timeout_s=self._timeouts.embedding,
            )
        except TriptychError as exc:
            self._give_back(room.pop(index), exc)
            if exc.item is None:
                exc.item = index
            raise
        rows = self._region.tensor(offset, item.meta.shape, getattr(torch, item.meta.dtype))
        self._extents[request_id, index] = room.pop(index)
        self._engine.submit(ItemLanded(request_id, index, rows))
        now = time.time()
        read = now - pulled.read_s
        self._on_spans(
            request_id,
            [
                Span(name="wait", start=asked, end=read, item=index),
                Span(
                    name="read",
                    start=read,
                    end=now,
                    item=index,
                    nbytes=pulled.nbytes,
                    transport=pulled.transport,
                ),
            ],
        )

    def _give_back(self, extent: Extent, exc: TriptychError) -> None:
        wait = exc.quarantine_s if isinstance(exc, TransferFailed) else 0.0
        if wait > 0:
            self._landing.quarantine(extent, wait)
        else:
            self._landing.free(extent)


def first_error(group: BaseExceptionGroup[TriptychError]) -> TriptychError:
    """The first error of a group that may hold groups."""
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    assert isinstance(first, TriptychError)
    return first
