"""How much the router takes on, and when one that it refuses may come again. No clock of its own.

Bounded are the requests in progress and the bytes held for them: bodies, and what their URLs
brought, until the first token. Tokens are bounded where they wait, by ``Attempt.place_prompt``.
"""

from __future__ import annotations

import math

from triptych.errors import Overloaded

MEMORY_S = 30.0
"""A pace is that of the last so many seconds, about."""
LEAST_S, MOST_S = 1.0, 120.0
"""Of a Retry-After."""


class Pace:
    """How fast something gets done, of late."""

    def __init__(self) -> None:
        self._done = 0.0
        """Weighted by age: what was done ``MEMORY_S`` ago counts 1/e."""
        self._began = self._at = 0.0
        self._idle_since: float | None = 0.0

    def begin(self, now: float) -> None:
        """There is something to do from now on. Idempotent."""
        if self._idle_since is not None:  # time without work says nothing about the pace
            idle = now - self._idle_since
            self._began, self._at, self._idle_since = self._began + idle, self._at + idle, None

    def done(self, amount: float, now: float) -> None:
        self._done = self._aged(now) + amount
        self._at = now

    def pause(self, now: float) -> None:
        """There is nothing more to do. Idempotent."""
        if self._idle_since is None:
            self._idle_since = now

    def seconds_for(self, amount: float, now: float) -> float:
        """Until so much is done, at this pace; between ``LEAST_S`` and ``MOST_S``."""
        done = self._aged(now)
        if amount <= 0 or done <= 0:
            return LEAST_S
        worked = max(now - self._began, LEAST_S)
        over = MEMORY_S * (1 - math.exp(-worked / MEMORY_S))
        return min(max(LEAST_S, amount * over / done), MOST_S)

    def _aged(self, now: float) -> float:
        return self._done * math.exp(-(now - self._at) / MEMORY_S)


class Admission:
    """``max_requests`` in progress, ``max_nbytes`` held for them; a request by itself may hold
    more."""

    def __init__(self, max_requests: int, max_nbytes: int) -> None:
        self._max_requests = max_requests
        self._max_nbytes = max_nbytes
        self._pace = Pace()
        self._refused = 0
        """Since a request last ended: each of them is told to come when the next place is free
        that was not promised to one before it."""
        self.requests = 0
        self.nbytes = 0

    def enter(self, now: float) -> Place:
        """Raises Overloaded."""
        self._pace.begin(now)
        if self.requests >= self._max_requests:
            raise self.refusal(f"{self._max_requests} requests are in progress already", now)
        self.requests += 1
        return Place(self)

    def check_bytes(self, place: Place, more: int, now: float) -> None:
        """Raises Overloaded unless ``place`` may hold so many more bytes."""
        others = self.nbytes - place.nbytes
        if others and self.nbytes + more > self._max_nbytes:
            raise self.refusal(f"more than {self._max_nbytes} bytes are held for requests", now)

    def refusal(self, reason: str, now: float) -> Overloaded:
        self._refused += 1
        return Overloaded(reason, retry_after_s=self.retry_after_s(now))

    def retry_after_s(self, now: float) -> float:
        """Until a request has ended for each that was refused since one last did."""
        return self._pace.seconds_for(max(1, self._refused), now)

    def ended(self, now: float) -> None:
        self._refused = 0
        self._pace.done(1, now)
        if not self.requests:
            self._pace.pause(now)


class Place:
    """What one request takes of an ``Admission``."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._open = True
        self.nbytes = 0

    def hold(self, nbytes: int, now: float) -> None:
        """So many bytes more. Raises Overloaded."""
        self._admission.check_bytes(self, nbytes, now)
        self._count(nbytes)

    def drop(self, nbytes: int) -> None:
        self._count(-nbytes)

    def leave(self, now: float) -> None:
        """The request has ended. Idempotent."""
        if self._open:
            self._open = False
            self._count(-self.nbytes)
            self._admission.requests -= 1
            self._admission.ended(now)

    def _count(self, nbytes: int) -> None:
        self.nbytes += nbytes
        self._admission.nbytes += nbytes
