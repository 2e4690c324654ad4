"""What the random test of pool and lender knows of each thing, and a clock that it can turn."""

from __future__ import annotations

import asyncio
import selectors
from dataclasses import dataclass
from typing import TypeVar

from triptych.refs import EmbeddingRef
from triptych.transfer.pool import Extent

T = TypeVar("T")
PAGE = 4096
PAGES = 12
START = 3 * PAGE
LEASE_S = 60.0
WAIT_S = 100.0
QUARANTINE_S = 36.0
REQUESTS = 5
SESSIONS = 3


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time is what we say it is."""

    def __init__(self) -> None:
        super().__init__(selectors.SelectSelector())
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def turn(self) -> None:
        """Let everything that can go on now, go on."""
        while True:
            self.call_soon(self.stop)
            self.run_forever()
            if not self._ready:  # type: ignore[attr-defined]
                return


@dataclass
class Lent:
    ref: EmbeddingRef
    extent: Extent
    filled: bool = False


@dataclass
class Claim:
    session: str
    number: int
    slot: int
    request: str
    ready: bool = False
    marks: list[int] | None = None
    """What the pages held when they were read."""


@dataclass(eq=False)
class Waiting:
    task: asyncio.Task[list[Extent]]
    request: str
    sizes: list[int]
    passed: int = 0


@dataclass
class Counts:
    operations: int = 0
    valid: int = 0
    expired: int = 0
    denied: int = 0
    waited: int = 0
    groups: int = 0
    passed: int = 0
    stale_reads: int = 0


def pick(things: list[T], number: int) -> T | None:
    return things[number % len(things)] if things else None
