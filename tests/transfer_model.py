"""What the random test of pool and lender knows of each thing, and a clock that it can turn."""

from __future__ import annotations

import asyncio
import selectors
from dataclasses import dataclass

from triptych.refs import EmbeddingRef
from triptych.transfer.pool import Extent


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time is what we say it is."""

    def __init__(self) -> None:
        super().__init__(selectors.SelectSelector())
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def turn(self) -> None:
        """Let everything that can go on now, go on."""
        for _ in range(3):
            self.call_soon(self.stop)
            self.run_forever()


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
    task: asyncio.Task[Extent]
    request: str
    passed: int = 0


@dataclass
class Counts:
    operations: int = 0
    valid: int = 0
    expired: int = 0
    denied: int = 0
    waited: int = 0
    passed: int = 0
    stale_reads: int = 0
