"""A worker's way out: it is given nothing new, what runs ends, and it says so."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from triptych import wire

logger = logging.getLogger(__name__)
POLL_S = 0.02
"""Between two looks at whether anything runs; only while it drains."""


class Drain:
    """``busy()``: something is held or computed for a request. ``report``: tells the router.

    What is new only the router knows: a request that it has given this worker may send it more.
    So it stops giving it requests when it is told, and says when none is left. Then, or when
    there is no router, the end of what is held here is the end of all.
    """

    def __init__(self, busy: Callable[[], bool], report: Callable[[wire.Message], None]) -> None:
        self.begun = False
        self._busy = busy
        self._report = report
        self._needed = False
        self._done = asyncio.Event()
        self._hurry = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def begin(self, *, registered: bool) -> None:
        """Idempotent. ``registered``: there is a router that may have requests here."""
        if self.begun:
            return
        logger.info("draining: nothing new is taken")
        self.begun, self._needed = True, registered
        self._report(wire.Draining())
        self._ending = asyncio.create_task(self._end())

    def unneeded(self) -> None:
        """The router has said so, or it is gone."""
        self._needed = False

    def hurry(self) -> None:
        """Wait no longer."""
        self._hurry.set()

    async def wait(self, timeout_s: float) -> bool:
        """Whether nothing runs any more, within ``timeout_s``."""
        waits = [asyncio.create_task(event.wait()) for event in (self._done, self._hurry)]
        try:
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return self.done

    def close(self) -> None:
        if self._ending is not None:
            self._ending.cancel()

    async def _end(self) -> None:
        """Every request that is waited for here has a deadline of its own."""
        while self._needed or self._busy():  # noqa: ASYNC110 (many things end it)
            await asyncio.sleep(POLL_S)
        logger.info("drained: nothing runs here")
        self._report(wire.Draining(done=True))
        self._done.set()
