"""A transfer thread: bytes move here, one job at a time, and the event loop never waits.

There is one for each producer that is read from, so that a peer that has stopped holds up nobody
but those who wait for it (docs/decisions/0002-a-thread-for-each-producer.md).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from triptych.errors import TransferFailed

T = TypeVar("T")

STUCK_QUARANTINE_S = 60.0
"""After a job that did not come back in time: how long its destination is not to be touched."""


class Mover:
    """One thread and its queue. The thread starts with the first job."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="transfer")
        self._closed = False

    async def run(self, job: Callable[[float], T], timeout_s: float, grace_s: float = 1.0) -> T:
        """Result of ``job(seconds left)``, which must itself end within the seconds left.

        Cancelled while queued, the job never runs. Cancelled while it runs, CancelledError is
        raised only once it has ended and its memory is safe, so whoever cancels may reuse the
        destination. Raises what the job raises, or TransferFailed when it has not come back
        ``grace_s`` after its time.
        """
        if self._closed:
            raise TransferFailed("the transfer thread is closed")
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + timeout_s
        ended: asyncio.Future[None] = loop.create_future()
        woken: asyncio.Future[None] = loop.create_future()
        late = loop.call_later(timeout_s + grace_s, _set, woken)

        def tell(_: Future[T]) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_set, ended, woken)

        # Nothing is left to do here once the job is submitted but to wait: a copy takes
        # microseconds, and then its thread wants Python's lock back.
        queued = self._thread.submit(lambda: job(max(0.0, deadline - time.monotonic())))
        queued.add_done_callback(tell)
        try:
            await woken
        except asyncio.CancelledError:
            await self._drain(queued, ended, timeout_s + grace_s)
            raise
        finally:
            late.cancel()
        if queued.done():
            return queued.result()
        if queued.cancel():
            raise TransferFailed(f"the transfer thread was busy for {timeout_s:g} s")
        raise TransferFailed(
            f"a read did not come back within {timeout_s + grace_s:g} s",
            quarantine_s=STUCK_QUARANTINE_S,
        )

    def post(self, job: Callable[[], None]) -> None:
        """Run a job after those queued, unless closed; nobody waits for it. It must not raise."""
        if not self._closed:
            self._thread.submit(job)

    def close(self) -> None:
        """Take no more jobs; the thread ends after those queued."""
        self._closed = True
        self._thread.shutdown(wait=False)

    async def _drain(
        self, queued: Future[T], ended: asyncio.Future[None], timeout_s: float
    ) -> None:
        """Wait until the job cannot write any more."""
        if queued.cancel():
            return
        await _undisturbed(ended, timeout_s)
        if not ended.done():
            await _undisturbed(ended, STUCK_QUARANTINE_S)
        elif isinstance(failure := queued.exception(), TransferFailed):
            await _undisturbed(asyncio.Future(), failure.quarantine_s)


async def _undisturbed(future: asyncio.Future[None], timeout_s: float) -> None:
    """Wait for the future or the time, whatever is cancelled meanwhile: the caller is already
    being cancelled and will say so."""
    end = time.monotonic() + timeout_s
    while not future.done() and (left := end - time.monotonic()) > 0:
        try:
            await asyncio.wait({future}, timeout=left)
        except asyncio.CancelledError:
            continue


def _set(*futures: asyncio.Future[None]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
