"""The HTTP side of a process: a bound socket, a uvicorn server on it, and typed POST routes."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import math
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import TypeVar

import msgspec
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from triptych import wire
from triptych.config import Secrets
from triptych.errors import BadRequest, ConfigError, Overloaded, TriptychError, Unauthorized
from triptych.observe.metrics import rpc_seconds
from triptych.transfer.channel import Channel, Sessions

logger = logging.getLogger(__name__)
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


class HttpServer(uvicorn.Server):
    """uvicorn on a socket of ours; signals are the process's business, not the server's."""

    def __init__(self, app: ASGIApp, sock: socket.socket, drain_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="httptools",
                ws="websockets-sansio",
                ws_max_size=wire.MAX_FRAME,
                ws_ping_interval=None,  # the channel has heartbeats of its own
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=1024,
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
