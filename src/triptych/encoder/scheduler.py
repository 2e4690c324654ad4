"""Which image is prepared next, and which images share a forward. Plain data in, plain data out.

Work is measured in vision patches, since requests and even images say little about its cost.
Images of short requests go first. What has waited counts as well, and is measured in work that
was done meanwhile: seconds would make everything equally urgent just when the queue is long.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from enum import Enum, auto

from triptych.errors import Overloaded

PASSES = 16
"""A request is passed by later ones until so many times its own patches have been encoded."""
AHEAD_BATCHES = 3
"""Batches of patches that may be prepared ahead of the forward: bounds the pixels in memory."""
URGENT_BATCHES = 2
"""Batches more, for images that would be in the next forward."""

RETRY_AFTER_S = (1.0, 60.0)
"""Shortest and longest time that a refused request is told to stay away."""
PACE_MEMORY = 0.8
"""Share of the pace so far in the pace that a forward leaves behind."""


class Phase(Enum):
    WAITING = auto()
    PREPARING = auto()
    PREPARED = auto()
    RUNNING = auto()


FOLLOWS = {
    Phase.PREPARING: Phase.WAITING,
    Phase.PREPARED: Phase.PREPARING,
    Phase.RUNNING: Phase.PREPARED,
}
"""Phase → the only phase that it may be entered from."""


@dataclass
class _Work:
    number: int
    patches: int
    nbytes: int
    turn: int
    long: bool
    """Of a request that is more than half a batch."""
    phase: Phase = Phase.WAITING

    @property
    def order(self) -> tuple[int, int]:
        return self.turn, self.number


def retry_after(patches: float, pace: float) -> float:
    """Seconds until so many patches are encoded at ``pace`` patches a second (0: not known yet),
    within ``RETRY_AFTER_S``."""
    shortest, longest = RETRY_AFTER_S
    return min(longest, max(shortest, patches / pace)) if pace else shortest


class EncodeScheduler:
    """Images from their arrival to the end of their forward, known by a number of the caller's.

    ``batch_patches``: most patches of one forward (a larger image runs alone). ``queue_patches``
    and ``queue_nbytes``: most patches and file bytes that wait for a forward. ``preparers``: most
    images in preparation at once.
    """

    def __init__(
        self, *, batch_patches: int, queue_patches: int, queue_nbytes: int, preparers: int
    ) -> None:
        self._batch_patches = batch_patches
        self._queue_patches = queue_patches
        self._queue_nbytes = queue_nbytes
        self._preparers = preparers
        self._work: dict[int, _Work] = {}
        self._waiting: list[tuple[int, int]] = []
        """Heap of (turn, number); what was cancelled is skipped when it comes up."""
        self._begun_patches = 0
        """Of all forwards so far."""
        self._in_phase: dict[Phase, dict[int, _Work]] = {phase: {} for phase in Phase}
        self._queued_patches = 0
        self._queued_nbytes = 0
        self._pace = 0.0
        """Patches a second; 0 before the first forward."""
        self._promised = 0
        """So many patches will have begun when all requests that were refused have had room."""

    @property
    def queued(self) -> tuple[int, int, int]:
        """Images that wait for a forward, their patches, the bytes of their files."""
        images = len(self._work) - len(self._in_phase[Phase.RUNNING])
        return images, self._queued_patches, self._queued_nbytes

    def check_room(self, patches: int, nbytes: int) -> None:
        """Raises Overloaded unless so much more may wait. An empty queue takes anything."""
        if len(self._in_phase[Phase.RUNNING]) == len(self._work):
            return
        excess = self._queued_patches + patches - self._queue_patches
        if excess > 0:
            raise Overloaded(
                f"more than {self._queue_patches} vision patches wait to be encoded",
                retry_after_s=self._promise(excess, patches),
            )
        excess_nbytes = self._queued_nbytes + nbytes - self._queue_nbytes
        if excess_nbytes > 0:
            share = excess_nbytes / max(1, self._queued_nbytes)
            raise Overloaded(
                f"more than {self._queue_nbytes} bytes of files wait to be encoded",
                retry_after_s=self._promise(round(share * self._queued_patches), patches),
            )

    def encoded(self, patches: int, seconds: float) -> None:
        """So many patches took so long, with what was waited for."""
        pace = patches / max(seconds, 1e-6)
        memory = PACE_MEMORY if self._pace else 0.0
        self._pace = memory * self._pace + (1 - memory) * pace

    def _promise(self, excess: int, patches: int) -> float:
        """Seconds until a request that is refused has room: ``excess`` patches of the queue are
        encoded by then, and the ``patches`` of those that were refused before it have had room.
        They may not come again, and an empty queue takes anything: nobody is told to wait longer
        than the whole queue takes."""
        promised = self._promised - self._begun_patches + patches
        wait = min(max(excess, promised), self._queued_patches)
        self._promised = self._begun_patches + wait
        return retry_after(wait, self._pace)

    def add(self, number: int, patches: int, nbytes: int, request_patches: int) -> None:
        """``request_patches``: of all images that came with this one."""
        assert number not in self._work, f"work {number} is already known"
        turn = self._begun_patches + PASSES * request_patches
        long = 2 * request_patches > self._batch_patches
        work = self._work[number] = _Work(number, patches, nbytes, turn, long)
        self._in_phase[Phase.WAITING][number] = work
        heapq.heappush(self._waiting, work.order)
        self._queued_patches += patches
        self._queued_nbytes += nbytes

    def next_to_prepare(self) -> int | None:
        """The image whose preparation begins now, if one may."""
        waiting, preparing = self._in_phase[Phase.WAITING], self._in_phase[Phase.PREPARING]
        while self._waiting and self._waiting[0][1] not in waiting:
            heapq.heappop(self._waiting)
        if not self._waiting or len(preparing) >= self._preparers:
            return None
        chosen = waiting[self._waiting[0][1]]
        others = (*preparing.values(), *self._in_phase[Phase.PREPARED].values())
        ahead = chosen.patches + sum(work.patches for work in others)
        sooner = chosen.patches + sum(w.patches for w in others if w.order < chosen.order)
        batch = max(self._batch_patches, chosen.patches)  # a larger image is a batch by itself
        batches = AHEAD_BATCHES + (URGENT_BATCHES if sooner <= batch else 0)
        if others and ahead > batches * batch:
            return None
        self._advance(chosen, Phase.PREPARING)
        return chosen.number

    def prepared(self, number: int) -> None:
        self._advance(self._work[number], Phase.PREPARED)

    def next_batch(self) -> list[int]:
        """The images of the next forward: the one whose turn it is, and what still fits beside it.

        While there are images of short requests, those of long ones (more than half a batch) do
        not fill it up: a short request waits for no forward that is full of others' work.
        """
        ready = sorted(self._in_phase[Phase.PREPARED].values(), key=lambda work: work.order)
        any_short = any(not work.long for work in ready)
        room = self._batch_patches
        batch: list[int] = []
        for work in ready:
            if batch and (work.patches > room or (work.long and any_short)):
                continue
            batch.append(work.number)
            room -= work.patches
            self._begun_patches += work.patches
            self._advance(work, Phase.RUNNING)
            self._unqueue(work)
        return batch

    def done(self, number: int) -> None:
        """The image's forward has ended, or its preparation failed."""
        self._forget(self._work[number])

    def cancel(self, number: int) -> bool:
        """Forget an image. False: its forward is running, and ``done`` will say when it ends."""
        work = self._work.get(number)
        if work is None:
            return True
        if work.phase is Phase.RUNNING:
            return False
        self._forget(work)
        return True

    def _forget(self, work: _Work) -> None:
        del self._work[work.number], self._in_phase[work.phase][work.number]
        if work.phase is not Phase.RUNNING:
            self._unqueue(work)

    def _unqueue(self, work: _Work) -> None:
        self._queued_patches -= work.patches
        self._queued_nbytes -= work.nbytes

    def _advance(self, work: _Work, phase: Phase) -> None:
        assert work.phase is FOLLOWS[phase], f"work {work.number}: {work.phase} → {phase}"
        del self._in_phase[work.phase][work.number]
        work.phase = phase
        self._in_phase[phase][work.number] = work
