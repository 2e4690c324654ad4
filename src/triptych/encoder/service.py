"""The encoder's life of an item, on the event loop: from its digest to an embedding in a slot.

``encode`` answers as soon as the header is read and a slot is set aside: nothing there decodes,
hashes or computes. What follows is told by the methods in their order: ``_start`` queues the
image, ``_pump`` has it prepared and then, batched, gives it to the engine thread, ``_finish``
makes the slot readable. Images that are already in the pool, or on their way into it, are lent
again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Protocol

from triptych import wire
from triptych.config import EncoderConfig
from triptych.encoder import counts
from triptych.encoder.admission import Admission
from triptych.encoder.cache import EmbeddingCache
from triptych.encoder.embedding import Draft, Embedding
from triptych.encoder.kept import Kept
from triptych.encoder.planner import Asked, Planner
from triptych.encoder.preparation import Prepared, Preparer, preparation_error
from triptych.encoder.runner import BatchResult, Runner, warm_up_batches
from triptych.encoder.scheduler import EncodeScheduler
from triptych.errors import DeviceLost, TriptychError
from triptych.media.processor import Processor
from triptych.models.vision import VisionModel
from triptych.observe.metrics import export_usage
from triptych.refs import EmbeddingRef
from triptych.request import Span
from triptych.transfer.pool import Extent, Pool
from triptych.transfer.producer import Producer
from triptych.transfer.region import BaseRegion

logger = logging.getLogger(__name__)

QUEUE_NBYTES = 256 << 20
"""Bytes of image files that may wait to be encoded."""


class Worker(Protocol):
    """The process around the service: a ``Stage``, by its own words."""

    def report(self, message: wire.Message) -> None:
        """Tell the router."""

    def spans(self, request_id: str, spans: Sequence[Span]) -> None:
        """Tell the router."""

    def fail(self, error: TriptychError) -> None:
        """End: nothing more can be done here."""


class EncoderService:
    """Owner of the pool's slots. Every method runs on the event loop."""

    def __init__(
        self,
        config: EncoderConfig,
        identity: wire.ModelIdentity,
        processor: Processor,
        model: VisionModel,
        region: BaseRegion,
        *,
        producer: Callable[[Callable[[int], None]], Producer],
        worker: Worker,
    ) -> None:
        """``producer(on_idle)`` makes the producer."""
        self._timeouts = config.timeouts
        self._model = model
        self._worker = worker
        self.producer = producer(self._on_idle)
        self._kept = Kept()
        pool_nbytes = config.pool_mib << 20
        self.pool = Pool(
            region.carve(pool_nbytes),
            pool_nbytes,
            evictable=self._kept.evictable,
            full=self._kept.full,
            on_pressure=self._relieve,
        )
        export_usage("embeddings", self.pool)
        self._planner = Planner(identity, processor, model, config.limits, self.pool.nbytes)
        self._admission = Admission(self.pool)
        self.cache = EmbeddingCache()
        self._preparer = Preparer(processor, config.limits, model, config.media_threads)
        self._scheduler = EncodeScheduler(
            batch_patches=config.batch_patches,
            queue_patches=config.queue_patches,
            queue_nbytes=QUEUE_NBYTES,
            preparers=self._preparer.at_once,
        )
        counts.export_queue(self._scheduler)
        self._warm_up_batches = partial(warm_up_batches, model, processor, config.batch_patches)
        self._runner = Runner(model, region, self._from_runner, config.threads)
        self._running = False
        self._busy_since: float | None = None
        """Wall-clock seconds of the last forward's end, if work waited then."""
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._embeddings: dict[int, Embedding] = {}
        """By slot."""
        self._coming: dict[int, Embedding] = {}
        """Those of them that are not full yet."""

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        on_cpu = self._model.device.type == "cpu"  # where a first forward costs no more than others
        warm_up = [] if on_cpu else await asyncio.to_thread(self._warm_up_batches)
        await asyncio.wrap_future(self._runner.start(warm_up))

    async def stop(self) -> None:
        """Ends all threads; what they still work on is dropped."""
        self._stopping = True
        self._admission.close()
        self.producer.close()
        await asyncio.to_thread(self._runner.close, self._timeouts.drain)
        preparing = asyncio.create_task(asyncio.to_thread(self._preparer.close))
        await asyncio.wait({preparing}, timeout=self._timeouts.drain)

    # ------------------------------------------------------------------ the router's calls

    async def encode(self, message: wire.EncodeRequest, session_id: str) -> wire.EncodeResponse:
        """``POST /encode``. Waits for the headers of videos and, if it is to, for room.

        An item at fault is answered with its error; the request fails as a whole by Overloaded
        (queue, or no room in time), NoRoom (none now, and it is not to wait), PromptTooLong (never
        any room) or Cancelled. It takes nothing here until there is room for all it lacks.
        """
        request = message.request_id
        headers = await self._planner.video_headers(message)
        asked = Asked(message, self._planner, headers)
        room = await self._room(asked)
        together = sum(asked.drafts[key].patches for key in room)
        answers = []
        for index, key in asked.keys.items():
            slot = self.cache.find(key)
            if slot is not None:
                answers.append(self._lend(slot, index, request, session_id))
            elif key in room:
                draft, extent = asked.drafts[key], room.pop(key)
                answers.append(self._open(draft, extent, index, request, session_id, together))
            else:
                answers.append(asked.without_slot(index))
        self.pool.free_all(room.values())  # somebody else has brought these meanwhile
        self._pump()
        return wire.EncodeResponse(tuple(answers))

    def cancel(self, request_id: str) -> None:
        """Drop the request's leases and what is done for nobody else. Idempotent."""
        self._admission.cancel(request_id)
        for embedding in self._coming.values():
            embedding.waiters = [w for w in embedding.waiters if w[0] != request_id]
        self.producer.cancel(request_id)

    # ------------------------------------------------------------------ before the answer

    async def _room(self, asked: Asked) -> dict[str, Extent]:
        """Room for every item whose bytes came and whose embedding is not here, by key."""
        request, until = asked.message.request_id, time.monotonic() + self._timeouts.pool
        self._admission.check(request)
        room: dict[str, Extent] = {}
        while not (missing := asked.missing(self.cache)).keys() <= room.keys():
            # One that was cached has been evicted during the wait: in line again, empty-handed.
            self.pool.free_all(room.values())
            with counts.refusals_of("queue"):
                self._scheduler.check_room(
                    sum(draft.patches for draft in missing.values()),
                    sum(len(draft.raw.data) for draft in missing.values()),
                )
            sizes = [draft.meta.nbytes for draft in missing.values()]
            with counts.refusals_of("pool"):
                if asked.message.wait:
                    left = until - time.monotonic()
                    extents = await self._admission.take(sizes, request, left)
                else:
                    extents = self._admission.take_now(sizes)
            room = dict(zip(missing, extents, strict=True))
        return room

    def _open(
        self,
        draft: Draft,
        extent: Extent,
        index: int,
        request: str,
        session_id: str,
        together: int,
    ) -> wire.EncodedItem:
        """A new slot for an item; its way to the engine begins. ``together``: patches of all the
        items that come with it."""
        meta = draft.meta
        ref = self.producer.lend_embedding(
            wire.Piece(extent.offset, meta.nbytes),
            meta.key,
            meta.dtype,
            meta.shape,
            holder=session_id,
            request_id=request,
        )
        embedding = Embedding(ref.slot, meta, extent, draft.patches, raw=draft.raw)
        counts.looked_up("miss")
        embedding.waiters.append((request, index))
        self._embeddings[ref.slot] = self._coming[ref.slot] = embedding
        self.cache.add(meta.key, ref.slot)
        self._scheduler.add(ref.slot, draft.patches, len(draft.raw.data), together)
        return wire.EncodedItem(index, meta=meta, ref=ref)

    def _lend(self, slot: int, index: int, request: str, session_id: str) -> wire.EncodedItem:
        """A slot that exists: its embedding is there, or on its way for somebody else."""
        embedding = self._embeddings[slot]
        ref = self.producer.lend_again(slot, holder=session_id, request_id=request)
        assert isinstance(ref, EmbeddingRef)
        counts.looked_up("hit" if embedding.cached else "joined")
        if embedding.cached:
            self._kept.lease(slot, embedding.extent)
        else:
            embedding.waiters.append((request, index))
        return wire.EncodedItem(index, cached=embedding.cached, meta=embedding.meta, ref=ref)

    # ------------------------------------------------------------------ from slot to embedding

    def _pump(self) -> None:
        """Give every idle thread its next work."""
        if self._stopping:
            return
        while (slot := self._scheduler.next_to_prepare()) is not None:
            embedding = self._embeddings[slot]
            raw, embedding.raw = embedding.raw, None
            assert raw is not None, "an item is prepared once"
            future = self._preparer.submit(raw)
            future.add_done_callback(partial(self._from_media, slot))
            embedding.preparing = future
        if not self._running and (batch := self._scheduler.next_batch()):
            self._running = True
            self._runner.submit([self._embeddings[slot].job() for slot in batch])

    def _from_media(self, slot: int, future: Future[Prepared]) -> None:
        """On a thread that prepares, or that cancels."""
        if not future.cancelled():
            self._call(self._on_prepared, slot, future)

    def _from_runner(self, result: BatchResult) -> None:
        """On the engine thread."""
        self._call(self._on_batch, result)

    def _call(self, method: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None, "threads work between start and stop"
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(method, *arguments)

    def _on_prepared(self, slot: int, future: Future[Prepared]) -> None:
        embedding = self._embeddings.get(slot)
        if embedding is not None and not embedding.failed:  # else cancelled meanwhile
            embedding.preparing = None
            error = future.exception()
            if error is None:
                embedding.prepared = future.result()
                self._scheduler.prepared(slot)
            else:
                self._scheduler.done(slot)
                self._fail(embedding, error)
        self._pump()

    def _on_batch(self, result: BatchResult) -> None:
        self._running = False
        patches = sum(self._embeddings[slot].patches for slot in result.slots)
        counts.batch_ended(result, patches)
        self._scheduler.encoded(patches, result.copied - (self._busy_since or result.began))
        self._busy_since = result.copied if self._scheduler.queued[0] else None
        for slot in result.slots:
            self._scheduler.done(slot)
        self._pump()  # first: the next forward waits for none of what follows
        for slot in result.slots:
            embedding = self._embeddings[slot]
            if slot in result.errors:
                self._fail(embedding, result.errors[slot])
            elif self.producer.leases(slot):
                self._finish(embedding, result)
            else:  # cancelled while its forward ran
                counts.aborted("encoded")
                self._drop(embedding)

    def _finish(self, embedding: Embedding, result: BatchResult) -> None:
        """The embedding is in its slot: whoever claimed it may read."""
        self.cache.filled(embedding.slot)
        embedding.cached = True
        del self._coming[embedding.slot]
        self._kept.lease(embedding.slot, embedding.extent)
        piece = wire.Piece(embedding.extent.offset, embedding.meta.nbytes)
        self.producer.ready(embedding.slot, [piece], last=True)
        for request, index in embedding.waiters:
            self._worker.spans(request, embedding.spans(result, index))
        embedding.waiters.clear()
        embedding.prepared = None

    def _fail(self, embedding: Embedding, cause: BaseException) -> None:
        """This item alone has failed; those who wait for it are told, the key is free again."""
        error = preparation_error(cause)
        if isinstance(error, DeviceLost):
            self._worker.fail(error)
            return
        embedding.failed = True
        embedding.prepared = None
        self.cache.remove(embedding.slot)
        counts.refused(error)
        for message in embedding.failures(error):
            self._worker.report(message)
        embedding.waiters.clear()
        self.producer.fail(embedding.slot, error)
        if not self.producer.leases(embedding.slot):
            self._drop(embedding)

    # ------------------------------------------------------------------ leases and memory

    def _on_idle(self, slot: int) -> None:
        """Nobody holds a lease any more: keep what is full, stop what is under way."""
        embedding = self._embeddings.get(slot)
        if embedding is None:
            return
        if embedding.cached:
            self._kept.cache(slot, embedding.extent)
            self.pool.serve()  # what was pinned may make room for a waiter now
        elif embedding.failed:
            self._drop(embedding)
        elif self._scheduler.cancel(slot):
            counts.aborted("queued")
            self._drop(embedding)
        # else its forward is running; _on_batch drops it

    def _drop(self, embedding: Embedding) -> None:
        """Forget a slot without leases and give its memory back. Idempotent."""
        if self._embeddings.pop(embedding.slot, None) is None:
            return
        self._coming.pop(embedding.slot, None)
        self._kept.forget(embedding.slot)
        if embedding.preparing is not None:
            embedding.preparing.cancel()
        self.cache.remove(embedding.slot)
        self.producer.close_slot(embedding.slot)
        self.pool.free(embedding.extent)

    def _relieve(self, nbytes: int) -> bool:
        """The pool is full: let the embedding go that nobody has used for the longest time."""
        slot = self.cache.evict(lambda slot: self.producer.leases(slot) > 0)
        if slot is not None:
            self._drop(self._embeddings[slot])
        return slot is not None
