"""What workers say about a request, put in order: tokens by index, failures by name."""

from __future__ import annotations

import asyncio
from collections import deque

from triptych import wire
from triptych.errors import TriptychError, WorkerLost, rebuild
from triptych.request import TokenEvent
from triptych.router.membership import Worker


class StageFailed(Exception):
    """A failure together with the worker it came from. Never leaves the router."""

    def __init__(self, worker: Worker, error: TriptychError, *, reported: bool = False) -> None:
        super().__init__(error.message)
        self.worker = worker
        self.error = error
        self.reported = reported
        """By the worker itself, which is alive."""


class Inbox:
    """Everything that comes for one attempt at a request, from token ``first`` on."""

    def __init__(self, first: int) -> None:
        self._first = first
        self._held: dict[int, TokenEvent] = {}
        """Tokens that came before an earlier one: prefill and decode use different channels."""
        self._next = first
        self._from: dict[str, int] = {}
        """Index of the last token of each worker, whose own tokens come in order."""
        self._ready: deque[TokenEvent | StageFailed] = deque()
        self._wake: asyncio.Future[None] | None = None
        """Of the one who waits."""

    def token(self, worker: Worker, event: TokenEvent) -> None:
        last = self._from.get(worker.worker_id)
        if last is not None and event.index > last + 1:
            lost = f"{worker.worker_id} skipped from token {last} to {event.index}"
            self.fail(worker, WorkerLost(lost))
            return
        self._from[worker.worker_id] = event.index
        if event.index == self._next and not self._held:  # as nearly always
            self._next += 1
            self._ready.append(event)
            self._rouse()
            return
        if event.index < self._next:
            return
        self._held[event.index] = event
        while self._next in self._held:
            self._ready.append(self._held.pop(self._next))
            self._next += 1
        self._rouse()

    def fail(self, worker: Worker, error: TriptychError, *, reported: bool = False) -> None:
        if self._next > self._first and worker.role in ("encoder", "prefill"):
            return  # their work is done; if decode misses anything of it, decode says so
        self._ready.append(StageFailed(worker, error, reported=reported))
        self._rouse()

    async def take(self) -> list[TokenEvent]:
        """All tokens that have come, at least one. Raises StageFailed. No deadline of its own."""
        while not self._ready:
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        taken: list[TokenEvent] = []
        while self._ready:
            item = self._ready[0]
            if isinstance(item, StageFailed):
                if not taken:
                    raise item
                break
            taken.append(item)
            self._ready.popleft()
        return taken

    def _rouse(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def check(self) -> None:
        """Raises StageFailed if a worker has reported one."""
        for item in self._ready:
            if isinstance(item, StageFailed):
                raise item


class Inboxes:
    """Open inboxes by the id that a request has on the wire."""

    def __init__(self) -> None:
        self._open: dict[str, Inbox] = {}

    def open(self, wire_id: str, first: int) -> Inbox:
        inbox = self._open[wire_id] = Inbox(first)
        return inbox

    def close(self, wire_id: str) -> None:
        self._open.pop(wire_id, None)

    def tokens(self, worker: Worker, message: wire.Tokens) -> None:
        """One engine step. Tokens of requests that have ended are dropped."""
        for event in message.tokens:
            if (inbox := self._open.get(event.request_id)) is not None:
                inbox.token(worker, event)

    def failed(self, worker: Worker, message: wire.Failed) -> None:
        if (inbox := self._open.get(message.request_id)) is not None:
            item = None if message.item < 0 else message.item
            error = rebuild(message.error, message.reason, item=item)
            inbox.fail(worker, error, reported=True)
