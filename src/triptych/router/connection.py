"""HTTP/1.1 to a worker: kept-alive connections, one request at a time on each.

The router makes several small requests for each of a client's. A general HTTP client spends more
on one of them than the rest of the router on all; this one does what the roles' own servers need.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httptools

KEEP_ALIVE_S = 4.0
"""Idle connections are closed before the worker's server closes them (5 s)."""
SLICE_NBYTES = 1 << 16
"""Of a body that are written at once: other requests go on between them."""
SLICES_AT_ONCE = 2
"""Written in one turn of the loop, by all connections together."""
MAX_ANSWER = 64 << 20
"""Bytes of the longest answer."""


class BadAnswer(Exception):
    """What came is not an HTTP response, is too large, or ended early."""


class Connection(asyncio.Protocol):
    def __init__(self, turns: asyncio.Semaphore) -> None:
        """``turns``: of all connections, to write a slice in one turn of the loop."""
        self._turns = turns
        self.usable = True
        """Open, and nothing is under way on it."""
        self.idle_since = 0.0
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._parser: Any = None
        self._body = bytearray()
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._writable: asyncio.Future[None] | None = None
        """There while the transport takes no more."""

    async def post(
        self, target: str, headers: Mapping[str, str], body: Sequence[bytes]
    ) -> tuple[int, bytes]:
        """``body``: its pieces. (Status, body of the answer). Only while ``usable``.

        Raises BadAnswer and OSError.
        """
        self.usable = False
        self._parser = httptools.HttpResponseParser(self)
        self._body.clear()
        self._answer = self._loop.create_future()
        nbytes = sum(map(len, body))
        lines = [f"POST {target} HTTP/1.1", f"content-length: {nbytes}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join((*lines, "\r\n")).encode()
        try:
            if nbytes <= SLICE_NBYTES:
                self._transport.write(b"".join((head, *body)))
            else:
                self._transport.write(head)
                await self._write(body)
            return await self._answer
        finally:
            if not self.usable:
                self.close()

    async def _write(self, body: Sequence[bytes]) -> None:
        """Until all is written, or an answer has come before that."""
        assert self._answer is not None
        slices = (
            memoryview(piece)[start : start + SLICE_NBYTES]
            for piece in body
            for start in range(0, len(piece), SLICE_NBYTES)
        )
        for part in slices:
            async with self._turns:
                self._transport.write(part)
                await asyncio.sleep(0)  # written by the end of this turn of the loop
            if self._writable is not None:
                await asyncio.wait(
                    (self._writable, self._answer), return_when=asyncio.FIRST_COMPLETED
                )
            if self._answer.done():
                return

    def close(self) -> None:
        """Idempotent."""
        self.usable = False
        if self._answer is not None:
            self._answer.cancel()
        if self._transport is not None:
            self._transport.abort()

    # ------------------------------------------------------------------ of the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            self.close()  # nobody has asked for it
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._fail(BadAnswer(f"not an HTTP response: {exc}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        self.resume_writing()
        self._fail(exc if isinstance(exc, OSError) else BadAnswer("the connection was closed"))

    def pause_writing(self) -> None:
        self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)

    # ------------------------------------------------------------------ of the parser

    def on_body(self, data: bytes) -> None:
        self._body += data
        if len(self._body) > MAX_ANSWER:
            self._fail(BadAnswer(f"an answer of more than {MAX_ANSWER} bytes"))

    def on_message_complete(self) -> None:
        assert self._answer is not None
        if self._answer.done():
            self.usable = False  # an answer too many
            return
        status = self._parser.get_status_code()
        if status < 200:  # an interim response: the answer is still to come
            return
        self.usable = self._parser.should_keep_alive() and not self._transport.is_closing()
        self._answer.set_result((status, bytes(self._body)))


class Pool:
    """Connections by the base URL they go to. All calls on one event loop."""

    def __init__(self, connect_s: float) -> None:
        self._connect_s = connect_s
        self._turns = asyncio.Semaphore(SLICES_AT_ONCE)
        self._idle: dict[str, list[Connection]] = defaultdict(list)
        self._closed = False

    async def post(
        self, url: str, path: str, headers: Mapping[str, str], body: Sequence[bytes]
    ) -> tuple[int, bytes]:
        """As ``Connection.post``; TimeoutError when no connection is made in ``connect_s``,
        BadAnswer when ``url`` is not one of http."""
        connection = self._take(url) or await self._connect(url)
        host, base = urlsplit(url)[1:3]
        answer = await connection.post(base.rstrip("/") + path, {"host": host, **headers}, body)
        if connection.usable and not self._closed:
            connection.idle_since = asyncio.get_running_loop().time()
            self._idle[url].append(connection)
        else:
            connection.close()
        return answer

    def _take(self, url: str) -> Connection | None:
        """The one used last; those that are too old are closed."""
        idle = self._idle[url]
        oldest = asyncio.get_running_loop().time() - KEEP_ALIVE_S
        while idle:
            if (connection := idle.pop()).usable and connection.idle_since > oldest:
                return connection
            connection.close()
        return None

    async def _connect(self, url: str) -> Connection:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as exc:
            raise BadAnswer(f"not an address: {exc}") from exc
        if parts.scheme != "http" or host is None:
            raise BadAnswer("not an address that is posted to")
        async with asyncio.timeout(self._connect_s):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: Connection(self._turns), host, port or 80
            )
        return connection

    def close(self) -> None:
        self._closed = True
        for idle in self._idle.values():
            for connection in idle:
                connection.close()
        self._idle.clear()
