"""The router's requests to workers: a wire message out, a wire message in, errors of the tree."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from typing import TypeVar

import msgspec

from triptych import wire
from triptych.config import Timeouts
from triptych.errors import Overloaded, TriptychError, WorkerLost, rebuild
from triptych.router.connection import BadAnswer, Pool
from triptych.router.membership import Worker

M = TypeVar("M", bound=wire.Message)
NEWS_S = 0.5
"""For the end of a worker's channel to be heard after that of another of its connections."""
LARGE_NBYTES = 1 << 16
_BIN_8, _BIN_32 = b"\xc4", b"\xc6"
"""MessagePack's first bytes of byte strings, before lengths of one and of four bytes. A file of
``LARGE_NBYTES`` is too long for the form of two."""


class WorkerClient:
    """One connection pool for all workers. All calls on the event loop."""

    def __init__(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self._pool = Pool(timeouts.connect)

    async def post(
        self,
        worker: Worker,
        path: str,
        message: wire.Message,
        answer: type[M],
        *,
        wait_s: float = 0.0,
    ) -> M:
        """``POST path`` within ``timeouts.rpc`` plus ``wait_s``, the worker's own waiting.

        Raises what the worker answered, or WorkerLost when it cannot be reached, is silent or is
        lost meanwhile.
        """
        limit = self._timeouts.rpc + wait_s
        headers = {
            "content-type": wire.MEDIA_TYPE,
            wire.SESSION_HEADER: worker.channel.session,
            wire.TOKEN_HEADER: worker.channel.token,
        }
        try:
            async with asyncio.timeout(limit) as wait:
                worker.waits.add(wait)
                try:
                    status, body = await self._pool.post(worker.url, path, headers, pieces(message))
                finally:
                    worker.waits.discard(wait)
        except TimeoutError as exc:
            if not worker.channel.is_open:
                raise WorkerLost(f"{worker.worker_id} was lost before it answered {path}") from exc
            raise WorkerLost(f"{worker.worker_id} did not answer {path} in {limit:g} s") from exc
        except (BadAnswer, OSError) as exc:
            await _heard(worker)
            raise WorkerLost(
                f"{worker.worker_id} at {worker.url}: {exc or type(exc).__name__}"
            ) from exc
        try:
            if status == 200:
                return wire.decode(body, answer)
            raise _error(wire.decode(body, wire.Problem))
        except msgspec.DecodeError as exc:
            reason = f"{worker.worker_id} answered {path} by status {status}, no message: {exc}"
            raise WorkerLost(reason) from exc

    async def close(self) -> None:
        self._pool.close()


async def _heard(worker: Worker) -> None:
    """Returns when its channel has ended too, or has had the time to: a process that dies closes
    its connections one after the other, and whether it has died decides what is tried next."""
    if worker.channel.is_open:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(worker.drained.wait(), NEWS_S)


def pieces(message: wire.Message) -> list[bytes]:
    """``wire.encode(message)`` in pieces, in which large files are not copied: encoding several
    megabytes would hold the event loop up, and be their third copy."""
    if not isinstance(message, wire.EncodeRequest):
        return [wire.encode(message)]
    files: list[bytes] = []
    items = list(message.items)
    mark = secrets.token_bytes(16)
    for position, item in enumerate(items):
        if item.data is not None and len(item.data) >= LARGE_NBYTES:
            files.append(item.data)
            items[position] = msgspec.structs.replace(item, data=mark)
    encoded = wire.encode(msgspec.structs.replace(message, items=tuple(items)))
    head, *rest = encoded.split(_BIN_8 + bytes((len(mark),)) + mark)
    found = [head]
    for file, after in zip(files, rest, strict=True):
        found += (_BIN_32 + len(file).to_bytes(4, "big"), file, after)
    return found


def _error(problem: wire.Problem) -> TriptychError:
    item = None if problem.item < 0 else problem.item
    error = rebuild(problem.error, problem.reason, item=item)
    if isinstance(error, Overloaded) and problem.retry_after_s > 0:
        error.retry_after_s = problem.retry_after_s
    return error
