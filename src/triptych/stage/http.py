"""The HTTP side of a process: a bound socket, a uvicorn server on it, and typed POST routes."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import math
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, TypeVar

import msgspec
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from triptych import wire
from triptych.config import Secrets, TlsConfig
from triptych.errors import BadRequest, ConfigError, Overloaded, TriptychError, Unauthorized
from triptych.observe.metrics import rpc_seconds
from triptych.transfer.channel import Channel, Sessions

logger = logging.getLogger(__name__)
KEEP_ALIVE_S = 60
"""Idle connections of clients and peers are kept for so long: well beyond what those keep them
for, so that they do not use one that is being closed."""
HEAD_S = 30.0
"""A connection that has not sent a whole request line and headers by then is closed."""
READ_NBYTES = 72 << 10
"""Of one connection's body at once: above uvicorn's high-water mark, so that reading pauses after
each."""
MAX_HEAD = 64 << 10
"""Bytes of request line and headers."""
M = TypeVar("M", bound=wire.Message)
Handler = Callable[[M, Channel], Awaitable[wire.Message]]


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to ``host:port`` (0: any free port), not listening yet.

    Bound before the model is loaded, so that the process knows its own URL from the start.
    Raises ConfigError when the address is taken or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY on what it accepts; without, it does not.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as exc:
        sock.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {exc.strerror}") from exc
    sock.set_inheritable(False)
    return sock


def url_of(sock: socket.socket, advertise: str | None = None) -> str:
    host, port = sock.getsockname()[:2]
    name = advertise or host
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


class Protocol(HttpToolsProtocol):
    """uvicorn's, with an end to heads that are endless or never come."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_nbytes = 0
        self._no_head = self.loop.call_later(HEAD_S, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._no_head.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._head_nbytes += len(data)
        super().data_received(data)
        # While a head is incomplete: whatever has come since the last one is of it.
        if self._head_nbytes > MAX_HEAD and not self.transport.is_closing():
            self.send_400_response(f"The request's head is longer than {MAX_HEAD} bytes.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._no_head.cancel()
        self._no_head = self.loop.call_later(HEAD_S, self.transport.close)

    def on_headers_complete(self) -> None:
        self._no_head.cancel()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head_nbytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._head_nbytes = 0
        super().on_message_complete()


class SmallReads(asyncio.BufferedProtocol):
    """``Protocol`` with an upper limit on what is read at once: however many large bodies arrive
    at the same time, none of them holds the loop up for long."""

    _buffer = memoryview(bytearray(READ_NBYTES))
    """Of all connections: what is read is copied out at once."""

    def __init__(self, **parts: Any) -> None:
        self._inner = Protocol(**parts)
        self.connection_lost = self._inner.connection_lost  # type: ignore[method-assign]
        self.pause_writing = self._inner.pause_writing  # type: ignore[method-assign]
        self.resume_writing = self._inner.resume_writing  # type: ignore[method-assign]

    def connection_made(self, transport: Any) -> None:
        self._inner.connection_made(transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._inner.data_received(bytes(self._buffer[:nbytes]))

    def eof_received(self) -> None:
        self._inner.eof_received()


class HttpServer(uvicorn.Server):
    """uvicorn on a socket of ours; signals are the process's business, not the server's."""

    def __init__(
        self,
        app: ASGIApp,
        sock: socket.socket,
        drain_s: float,
        tls: TlsConfig = TlsConfig(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=SmallReads,  # type: ignore[arg-type]
                ws="websockets-sansio",
                ws_max_size=wire.MAX_FRAME,
                ws_ping_interval=None,  # the channel has heartbeats of its own
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=1024,
                timeout_keep_alive=KEEP_ALIVE_S,
                ssl_certfile=tls.certificate,
                ssl_keyfile=tls.key,
                timeout_graceful_shutdown=max(1, round(drain_s)),
            )
        )
        self._sock = sock

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def run_until_stopped(self) -> None:
        await self.serve(sockets=[self._sock])

    def stop(self) -> None:
        self.should_exit = True


class Turns:
    """Between two requests of a burst the event loop does what else has come: a probe of its health
    waits for one of them, not for all."""

    def __init__(self) -> None:
        self._next = asyncio.Lock()

    async def take(self) -> None:
        """In the order of asking, each in a round of the loop of its own."""
        async with self._next:
            await asyncio.sleep(0)


def post_route(
    path: str, kind: type[M], handler: Handler[M], sessions: Sessions, max_body: int
) -> Route:
    """``POST path``: an authenticated ``kind`` in, a message out, errors of the tree as Problem."""

    async def endpoint(request: Request) -> Response:
        try:
            channel = sessions.authorize(request.headers)
            body = await _body(request, max_body)
            with rpc_seconds.labels(path).time():
                answer = await handler(wire.decode(body, kind), channel)
        except TriptychError as exc:
            return problem(exc)
        except msgspec.DecodeError as exc:
            return problem(BadRequest(f"{path}: {exc}"))
        except ClientDisconnect:
            return Response(status_code=499)
        return Response(wire.encode(answer), media_type=wire.MEDIA_TYPE)

    return Route(path, endpoint, methods=["POST"])


async def _body(request: Request, limit: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise BadRequest(f"the body is larger than {limit} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def problem(exc: TriptychError) -> Response:
    """The answer of one role to another when something went wrong."""
    retry_after_s = exc.retry_after_s if isinstance(exc, Overloaded) else 0.0
    body = wire.Problem(
        error=type(exc).__name__,
        reason=exc.message,
        item=-1 if exc.item is None else exc.item,
        retry_after_s=retry_after_s,
    )
    return Response(
        wire.encode(body),
        status_code=exc.status,
        headers={"retry-after": str(math.ceil(retry_after_s))} if retry_after_s else None,
        media_type=wire.MEDIA_TYPE,
    )


def authorize_operator(headers: Mapping[str, str], secrets: Secrets) -> None:
    """Raises Unauthorized unless there is an operator's key and the request carries it."""
    if secrets.operator_key is None:
        raise Unauthorized("no operator's key is set here: TRIPTYCH_OPERATOR_KEY")
    given = headers.get("authorization", "").removeprefix("Bearer ").strip()
    if not hmac.compare_digest(given.encode(), secrets.operator_key.encode()):
        raise Unauthorized("the operator's key is missing or wrong")


def drained(worker_id: str, done: bool) -> dict[str, object]:
    """JSON answer to ``POST /drain``."""
    return {"worker": worker_id, "drained": done}


async def cancel_and_wait(*tasks: asyncio.Task[None]) -> None:
    """Cancel tasks and wait for their end; their own errors have been reported by themselves."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
