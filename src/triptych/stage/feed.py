"""Brings the embeddings that the engine asks for, one image at a time.

Where the encoder's memory can be mapped, the engine reads the rows in place; after every step that
did, their owner is asked whether they were right, and what was computed from them counts only
then. Rows that were not are borrowed again and computed again. Otherwise, for each image: room in
the landing area, then a pull from its encoder, then the rows go to the engine as a view of the
landing area. They go at once, while the encoder is still asked whether its lease covered the read;
what comes of them counts once it did, and if not the request ends, to be tried again by the router.
The engine says when it has used (or dropped) rows, and loan or room are given back. Room is taken
in the order in which the engine asks, which is that in which it computes. Rows that were given back
may be asked for again: they are claimed once more, and if their encoder has let go of them the
request ends with SlotGone, upon which the router has them encoded again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import operator
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from triptych import wire
from triptych.config import Timeouts
from triptych.engine.loop import Engine
from triptych.engine.messages import Cramped, ItemLanded, Lapsed, Proven, Used, Vouched
from triptych.engine.sequence import Trust
from triptych.errors import PeerRefused, TransferFailed, TriptychError
from triptych.request import Span
from triptych.stage.landing import LandingRoom
from triptych.transfer.consumer import Consumer
from triptych.transfer.pool import Extent, Pool
from triptych.transfer.pull import Copy, Loan
from triptych.transfer.region import BaseRegion

logger = logging.getLogger(__name__)
OnFailed = Callable[[str, TriptychError], None]
OnSpans = Callable[[str, Sequence[Span]], None]
MOST_LAPSES = 3
"""So often are an image's rows borrowed again before its request fails."""


@dataclass(frozen=True, eq=False)
class _Coming:
    """An image on its way to the engine."""

    request_id: str
    index: int
    item: wire.PrefillItem
    lapses: int = 0
    """How often it has had to be borrowed again."""


@dataclass
class _Request:
    """What the engine may ask for."""

    items: tuple[wire.PrefillItem, ...]
    coming: dict[int, _Coming] = field(default_factory=dict)
    """By index. What brings one that is not here any more brings it to nobody."""
    claimed: set[int] = field(default_factory=set)
    """Images whose leases are, or were, this process's: the router's have ended."""
    bringing: set[asyncio.Task[None]] = field(default_factory=set)
    """What may be stopped when it is not wanted any more."""
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    """All that is under way for it."""


@dataclass(frozen=True, eq=False)
class _Held:
    """Rows that the engine holds."""

    loan: Loan | Copy
    coming: _Coming
    """As it was brought."""
    extent: Extent | None = None
    """Of the landing area; None: they are in their encoder's memory."""


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
        self._room = LandingRoom(
            landing, timeouts.pool, lambda request_id: engine.submit(Cramped(request_id))
        )
        self._engine = engine
        self._timeouts = timeouts
        self._on_failed = on_failed
        self._on_spans = on_spans
        self._requests: dict[str, _Request] = {}
        self._declines: set[asyncio.Task[None]] = set()
        self._held: dict[tuple[str, int], _Held] = {}
        """By (request id, image)."""

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
        """The engine may ask for these from now on, until ``end``."""
        if items:
            self._requests[request_id] = _Request(tuple(items))

    def wanted(self, asked: Iterable[tuple[str, int]]) -> None:
        """The engine is to have these, (request id, image), the most urgent first."""
        for request_id, group in itertools.groupby(asked, key=operator.itemgetter(0)):
            request = self._requests.get(request_id)
            if request is None:
                continue
            missing = [
                _Coming(request_id, index, request.items[index])
                for _, index in group
                if not self._has(request_id, request, index)
            ]
            if missing:
                indices = {coming.index: coming for coming in missing}
                request.coming.update(indices)
                request.claimed.update(indices)
                task = self._run(request_id, self._bring_all(request, missing))
                request.bringing.add(task)
                task.add_done_callback(request.bringing.discard)

    def withdrawn(self, request_ids: Iterable[str]) -> None:
        """The engine does not want for now what is still on its way to these, but for rows that
        are borrowed in place of others."""
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None:
                request.coming = {i: c for i, c in request.coming.items() if c.lapses}
                for task in request.bringing:
                    task.cancel()

    def needless(self, found: Iterable[tuple[str, int]]) -> None:
        """The engine will not ask for these: the leases that the router holds on them end."""
        for request_id, index in found:
            request = self._requests.get(request_id)
            if request is not None and index not in request.claimed:
                request.claimed.add(index)
                task = asyncio.create_task(self._decline(request_id, request.items[index]))
                self._declines.add(task)
                task.add_done_callback(self._declines.discard)

    def used(self, used: Used) -> None:
        """The engine has read rows that may not have been right: hear what their owners say."""
        if used.request_id in self._requests:
            self._run(used.request_id, self._prove(used))

    def end(self, request_id: str) -> None:
        """Stop what is under way; rows the engine holds come back through ``consumed``.
        Idempotent."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            request.coming.clear()
            for task in request.tasks:
                task.cancel()

    def consumed(self, request_id: str, item: int) -> None:
        """The engine will not touch these rows again."""
        if held := self._held.pop((request_id, item), None):
            if held.extent is not None:
                self._room.free(held.extent)
            held.loan.release()

    async def close(self) -> None:
        tasks = [task for request in self._requests.values() for task in request.tasks]
        tasks += self._declines
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _has(self, request_id: str, request: _Request, index: int) -> bool:
        """The engine has it, or will."""
        return index in request.coming or (request_id, index) in self._held

    def _run(self, request_id: str, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """As a task that ends with the request."""
        tasks = self._requests[request_id].tasks
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return task

    # ------------------------------------------------------------------ to the engine

    async def _bring_all(self, request: _Request, wanted: Sequence[_Coming]) -> None:
        room: dict[int, Extent] = {}
        try:
            async with asyncio.TaskGroup() as pulls, self._room.turn:
                for coming in wanted:
                    if not self._consumer.in_place(coming.item.ref.owner):
                        nbytes = coming.item.meta.nbytes
                        room[coming.index] = await self._room.take(coming.request_id, nbytes)
                    pulls.create_task(self._bring(request, coming, room))
        except* TriptychError as group:
            self._on_failed(wanted[0].request_id, first_error(group))
        finally:
            # What is left was cancelled; a pull that is cancelled ends when nothing can be
            # written to its destination any more.
            for extent in room.values():
                self._room.free(extent)

    async def _bring(self, request: _Request, coming: _Coming, room: dict[int, Extent]) -> None:
        """Where nobody had spoken to the encoder yet, room was taken that may not be needed."""
        index, owner = coming.index, coming.item.ref.owner
        try:
            if await self._consumer.opens_in_place(owner, self._timeouts.embedding):
                if index in room:
                    self._room.free(room.pop(index))
                await self._borrow(request, coming)
            elif index in room:
                await self._copy(request, coming, room)
            else:
                raise TransferFailed(f"the memory of {owner} cannot be mapped any more")
        except TriptychError as exc:
            if exc.item is None:
                exc.item = index
            raise

    async def _copy(self, request: _Request, coming: _Coming, room: dict[int, Extent]) -> None:
        request_id, index, item = coming.request_id, coming.index, coming.item
        asked = time.time()
        offset = room[index].offset
        try:
            copy = await self._consumer.fetch(
                item.ref, request_id, offset, self._timeouts.embedding
            )
        except TriptychError as exc:
            wait = exc.quarantine_s if isinstance(exc, TransferFailed) else 0.0
            self._room.free(room.pop(index), wait)
            raise
        if request.coming.get(index) is not coming:
            copy.release()
            return
        del request.coming[index]
        rows = self._region.tensor(offset, item.meta.shape, getattr(torch, item.meta.dtype))
        held = self._held[request_id, index] = _Held(copy, coming, room.pop(index))
        self._engine.submit(ItemLanded(request_id, index, rows, Trust.COMING))
        self._run(request_id, self._vouch(held, copy))
        ready = time.time() - copy.read_s
        self._report(request_id, index, asked, ready, item.meta.nbytes, copy.transport)

    async def _vouch(self, held: _Held, copy: Copy) -> None:
        """Rows that were copied are right, or their request ends."""
        request_id, index = held.coming.request_id, held.coming.index
        try:
            await copy.validate()
        except TriptychError as exc:
            if self._held.get((request_id, index)) is held:
                exc.item = index if exc.item is None else exc.item
                self._on_failed(request_id, exc)
        else:
            if self._held.get((request_id, index)) is held:
                self._engine.submit(Vouched(request_id, index))

    def _report(
        self,
        request_id: str,
        index: int,
        asked: float,
        ready: float,
        nbytes: int,
        transport: str,
    ) -> None:
        """``ready``: since when nothing was waited for but the bytes themselves."""
        wait = Span(name="wait", start=asked, end=ready, item=index)
        read = Span(
            name="read",
            start=ready,
            end=time.time(),
            item=index,
            nbytes=nbytes,
            transport=transport,
        )
        self._on_spans(request_id, [wait, read])

    async def _decline(self, request_id: str, item: wire.PrefillItem) -> None:
        try:
            await self._consumer.decline(item.ref, request_id, self._timeouts.embedding)
        except TriptychError as exc:
            # An encoder that cannot be reached has lost the lease with its channel to the router.
            logger.info("an embedding of %s was not given back: %s", request_id, exc.message)

    # ------------------------------------------------------------------ in place

    async def _borrow(self, request: _Request, coming: _Coming) -> None:
        request_id, index, item = coming.request_id, coming.index, coming.item
        asked = time.time()
        loan = await self._consumer.borrow(item.ref, request_id, self._timeouts.embedding)
        if request.coming.get(index) is not coming:
            loan.release()
            return
        del request.coming[index]
        ready = time.time()
        self._held[request_id, index] = _Held(loan, coming)
        rows = loan.memory.view(getattr(torch, item.meta.dtype)).view(item.meta.shape)
        self._engine.submit(ItemLanded(request_id, index, rows, Trust.BORROWED))
        self._report(request_id, index, asked, ready, item.meta.nbytes, loan.transport)

    async def _prove(self, used: Used) -> None:
        request_id = used.request_id
        known = [
            self._held[request_id, index]
            for index in used.items
            if (request_id, index) in self._held
        ]
        if len(known) < len(used.items):
            return  # one has lapsed, and with it this step, or the request has ended
        answers = await asyncio.gather(
            *(held.loan.validate() for held in known), return_exceptions=True
        )
        failed = False
        for held, answer in zip(known, answers, strict=True):
            if isinstance(answer, TriptychError):
                failed = True
                if held.extent is None:  # else it ends with its request (``_vouch``)
                    self._lapsed(held, answer)
            elif answer is not None:
                raise answer
        if not failed:
            self._engine.submit(Proven(request_id, used.serial))

    def _lapsed(self, held: _Held, error: TriptychError) -> None:
        """Rows were used that may not have been theirs any more: borrow them once more."""
        request_id, index = held.coming.request_id, held.coming.index
        request = self._requests.get(request_id)
        if request is None or self._held.get((request_id, index)) is not held:
            return  # another step has found out already, or the request has ended
        del self._held[request_id, index]
        held.loan.release()
        logger.warning("image %d of %s is computed again: %s", index + 1, request_id, error.message)
        coming = replace(held.coming, lapses=held.coming.lapses + 1)
        request.coming[index] = coming
        self._engine.submit(Lapsed(request_id, index))
        self._run(request_id, self._borrow_again(request, coming, error))

    async def _borrow_again(self, request: _Request, coming: _Coming, error: TriptychError) -> None:
        try:
            if coming.lapses > MOST_LAPSES:
                raise error
            await self._borrow(request, coming)
        except TriptychError as exc:
            if exc.item is None:
                exc.item = coming.index
            self._on_failed(coming.request_id, exc)


def first_error(group: BaseExceptionGroup[TriptychError]) -> TriptychError:
    """The first error of a group that may hold groups."""
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    assert isinstance(first, TriptychError)
    return first
