"""The router's requests to workers: a wire message out, a wire message in, errors of the tree."""

from __future__ import annotations

import asyncio
import io
from typing import TypeVar

import aiohttp
import msgspec

from triptych import wire
from triptych.config import Timeouts
from triptych.errors import Overloaded, TriptychError, WorkerLost, rebuild
from triptych.router.membership import Worker

M = TypeVar("M", bound=wire.Message)
KEEP_ALIVE_S = 4.0
"""Idle connections are closed before the worker's server closes them (5 s)."""


class WorkerClient:
    """One connection pool for all workers. All calls on the event loop."""

    def __init__(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self._opened: aiohttp.ClientSession | None = None

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
        try:
            async with asyncio.timeout(limit) as wait:
                worker.waits.add(wait)
                try:
                    status, body = await self._post(worker, path, wire.encode(message))
                finally:
                    worker.waits.discard(wait)
        except TimeoutError as exc:
            raise WorkerLost(f"{worker.worker_id} did not answer {path} in {limit:g} s") from exc
        except (aiohttp.ClientError, OSError) as exc:
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

    async def _post(self, worker: Worker, path: str, body: bytes) -> tuple[int, bytes]:
        headers = {
            "Content-Type": wire.MEDIA_TYPE,
            wire.SESSION_HEADER: worker.channel.session,
            wire.TOKEN_HEADER: worker.channel.token,
        }
        data = io.BytesIO(body)  # written in pieces: other requests go on between them
        async with self._session().post(worker.url + path, data=data, headers=headers) as response:
            return response.status, await response.read()

    def _session(self) -> aiohttp.ClientSession:
        if self._opened is None:
            self._opened = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
                timeout=aiohttp.ClientTimeout(total=None, connect=self._timeouts.connect),
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
                trust_env=False,
            )
        return self._opened

    async def close(self) -> None:
        if self._opened is not None:
            await self._opened.close()


def _error(problem: wire.Problem) -> TriptychError:
    item = None if problem.item < 0 else problem.item
    error = rebuild(problem.error, problem.reason, item=item)
    if isinstance(error, Overloaded) and problem.retry_after_s > 0:
        error.retry_after_s = problem.retry_after_s
    return error
