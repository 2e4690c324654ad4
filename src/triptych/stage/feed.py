"""Brings the embeddings that the engine asks for, one image at a time.

Where the encoder's memory can be mapped, the engine reads the rows in place; after every step that
did, their owner is asked whether they were right, and what was computed from them counts only
then. Rows that were not are borrowed again and computed again. Otherwise, for each image: room in
the landing area, then a pull from its encoder, then the rows go to the engine as a view of the
landing area. The engine says when it has used (or dropped) them, and loan or room are given back.
Room is taken in the order in which the engine asks, which is that in which it computes, so that
nobody waits for room that is held by somebody who waits for him. A request that waits for room
while nobody but itself has any is *cramped*: the engine is told, since it would wait for its last
image in vain before it uses the first. Rows that were given back may be asked for again: they are
claimed once more, and if their encoder has let go of them the request ends with SlotGone, upon
which the router has them encoded again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import operator
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from triptych import wire
from triptych.config import Timeouts
from triptych.engine.loop import Engine
from triptych.engine.messages import Cramped, ItemLanded, Lapsed, Proven, Used
from triptych.errors import PeerRefused, TransferFailed, TriptychError
from triptych.request import Span
from triptych.transfer.consumer import Consumer
from triptych.transfer.pool import Extent, Pool
from triptych.transfer.pull import Loan
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


@dataclass(frozen=True)
class _Borrowed:
    """Rows in their encoder's memory that the engine holds."""

    loan: Loan
    item: wire.PrefillItem
    lapses: int
    """How often they have had to be borrowed again."""


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
        """Held by the request that takes room. Whoever holds room was asked for before whoever
        waits for it."""
        self._waiting = ""
        """The request that took, or takes, room last."""
        self._rooms: dict[Extent, str] = {}
        """All of the landing area that is taken, by request."""
        self._requests: dict[str, _Request] = {}
        self._declines: set[asyncio.Task[None]] = set()
        self._extents: dict[tuple[str, int], Extent] = {}
        """Landed rows that the engine holds, by (request id, image)."""
        self._borrowed: dict[tuple[str, int], _Borrowed] = {}

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
        """The engine has read borrowed rows: ask their owners whether they were right."""
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
        if extent := self._extents.pop((request_id, item), None):
            self._free(extent)
        if borrowed := self._borrowed.pop((request_id, item), None):
            borrowed.loan.release()

    async def close(self) -> None:
        tasks = [task for request in self._requests.values() for task in request.tasks]
        tasks += self._declines
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _has(self, request_id: str, request: _Request, index: int) -> bool:
        """The engine has it, or will."""
        key = (request_id, index)
        return index in request.coming or key in self._extents or key in self._borrowed

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
            async with asyncio.TaskGroup() as pulls, self._turn:
                for coming in wanted:
                    if not self._consumer.in_place(coming.item.ref.owner):
                        room[coming.index] = await self._room(coming)
                    pulls.create_task(self._bring(request, coming, room))
        except* TriptychError as group:
            self._on_failed(wanted[0].request_id, first_error(group))
        finally:
            # What is left was cancelled; a pull that is cancelled ends when nothing can be
            # written to its destination any more.
            for extent in room.values():
                self._free(extent)

    async def _room(self, coming: _Coming) -> Extent:
        """Whoever calls it has the turn. Raises Overloaded and PromptTooLong."""
        nbytes = coming.item.meta.nbytes
        self._waiting = coming.request_id
        extent = self._landing.try_allocate(nbytes)
        if extent is None:
            self._see_who_is_cramped()
            extent = await self._landing.allocate(nbytes, self._timeouts.pool)
        self._rooms[extent] = coming.request_id
        return extent

    def _free(self, extent: Extent, quarantine_s: float = 0.0) -> None:
        """Idempotent."""
        self._rooms.pop(extent, None)
        if quarantine_s > 0:
            self._landing.quarantine(extent, quarantine_s)
        else:
            self._landing.free(extent)
        if self._landing.is_waited_for:
            self._see_who_is_cramped()

    def _see_who_is_cramped(self) -> None:
        if all(owner == self._waiting for owner in self._rooms.values()):
            self._engine.submit(Cramped(self._waiting))

    async def _bring(self, request: _Request, coming: _Coming, room: dict[int, Extent]) -> None:
        """Where nobody had spoken to the encoder yet, room was taken that may not be needed."""
        index, owner = coming.index, coming.item.ref.owner
        try:
            if await self._consumer.opens_in_place(owner, self._timeouts.embedding):
                if index in room:
                    self._free(room.pop(index))
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
            pulled = await self._consumer.pull(
                item.ref,
                request_id,
                place=lambda first, pieces: [offset],
                landed=lambda first, count, ready: None,
                timeout_s=self._timeouts.embedding,
            )
        except TriptychError as exc:
            wait = exc.quarantine_s if isinstance(exc, TransferFailed) else 0.0
            self._free(room.pop(index), wait)
            raise
        if request.coming.get(index) is not coming:
            return
        del request.coming[index]
        rows = self._region.tensor(offset, item.meta.shape, getattr(torch, item.meta.dtype))
        self._extents[request_id, index] = room.pop(index)
        self._engine.submit(ItemLanded(request_id, index, rows))
        now = time.time()
        self._report(request_id, index, asked, now - pulled.read_s, pulled.nbytes, pulled.transport)

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
        self._borrowed[request_id, index] = _Borrowed(loan, item, coming.lapses)
        rows = loan.memory.view(getattr(torch, item.meta.dtype)).view(item.meta.shape)
        self._engine.submit(ItemLanded(request_id, index, rows, borrowed=True))
        self._report(request_id, index, asked, ready, item.meta.nbytes, loan.transport)

    async def _prove(self, used: Used) -> None:
        request_id = used.request_id
        known = [
            (index, self._borrowed[request_id, index])
            for index in used.items
            if (request_id, index) in self._borrowed
        ]
        if len(known) < len(used.items):
            return  # one has lapsed, and with it this step, or the request has ended
        answers = await asyncio.gather(
            *(borrowed.loan.validate() for _, borrowed in known), return_exceptions=True
        )
        failed = False
        for (index, borrowed), answer in zip(known, answers, strict=True):
            if isinstance(answer, TriptychError):
                failed = True
                self._lapsed(request_id, index, borrowed, answer)
            elif answer is not None:
                raise answer
        if not failed:
            self._engine.submit(Proven(request_id, used.serial))

    def _lapsed(
        self, request_id: str, index: int, borrowed: _Borrowed, error: TriptychError
    ) -> None:
        """Rows were used that may not have been theirs any more: borrow them once more."""
        request = self._requests.get(request_id)
        if request is None or self._borrowed.get((request_id, index)) is not borrowed:
            return  # another step has found out already, or the request has ended
        del self._borrowed[request_id, index]
        borrowed.loan.release()
        logger.warning("image %d of %s is computed again: %s", index + 1, request_id, error.message)
        coming = _Coming(request_id, index, borrowed.item, borrowed.lapses + 1)
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
