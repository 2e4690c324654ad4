"""The shell that every worker shares: an HTTP server, a place at the router, and their ends.

A role builds a ``Stage``, hands it a ``Service`` (what the role does) and adds its POST routes.
Everything here runs on the process's event loop and does no work of its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets as random
import signal
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute

from triptych import __version__, wire
from triptych.config import NetworkConfig, Secrets, Timeouts
from triptych.errors import PeerRefused, TriptychError, Unauthorized, WorkerLost
from triptych.observe import exposition
from triptych.observe.metrics import record_span
from triptych.refs import KVLayout
from triptych.request import Span
from triptych.stage.cancels import Cancels
from triptych.stage.draining import Drain
from triptych.stage.http import (
    Handler,
    HttpServer,
    authorize_operator,
    bind,
    cancel_and_wait,
    drained,
    post_route,
    url_of,
)
from triptych.transfer.channel import Channel, OnLost, OnMessage, Sessions
from triptych.transfer.handshake import Listener, dial

logger = logging.getLogger(__name__)
R = TypeVar("R", wire.EncodeRequest, wire.PrefillRequest, wire.ReserveRequest, wire.DecodeRequest)

REDIAL_S = 0.25
"""First wait before dialling a router that is not there; doubles up to REDIAL_MAX_S."""
REDIAL_MAX_S = 2.0
SPANS_S = 0.05
"""How long spans may wait for company; the router's timelines allow for it."""
MAX_BODY = 1 << 30
"""Bytes of the largest request body between roles."""


class Service(Protocol):
    """What a role does. All calls come on the event loop."""

    async def start(self) -> None:
        """Everything that must run before the worker says it is ready."""

    async def stop(self) -> None: ...

    def offers(self) -> tuple[wire.TransportOffer, ...]:
        """How this worker's pool can be read; () when nobody reads from it."""

    def on_message(self, channel: Channel, message: wire.ChannelMessage) -> None:
        """A channel message that the shell does not handle itself."""

    def on_lost(self, channel: Channel) -> None:
        """A channel is gone, and with it every lease its other end held."""

    def cancel(self, request_id: str) -> None:
        """End everything done for the request. Idempotent."""

    def busy(self) -> bool:
        """Something is held here for a request, or computed."""


class Stage:
    """One worker's shell: bound socket, sessions, registration, reports to the router."""

    def __init__(
        self,
        role: str,
        *,
        network: NetworkConfig,
        timeouts: Timeouts,
        secrets: Secrets,
        identity: wire.ModelIdentity,
    ) -> None:
        self.role = role
        self.network = network
        self.timeouts = timeouts
        self.secrets = secrets
        self.identity = identity
        self.capacity = wire.Capacity()
        self.kv: KVLayout | None = None
        self.transports: tuple[str, ...] = ()
        self.nonce = random.token_hex(16)
        self.worker_id = f"{role}-{os.getpid()}-{self.nonce[:6]}"
        self._socket = bind(network.host, network.port)
        self.url = url_of(self._socket, network.advertise)
        self.sessions = Sessions()
        self.router: Channel | None = None
        """The channel to the router while there is one."""
        self.started = asyncio.Event()
        """Set once the worker is registered with its router."""
        self._service: Service | None = None
        self._routes: list[BaseRoute] = []
        self._cancels = Cancels()
        self._stopping = asyncio.Event()
        self._drain = Drain(lambda: self.service.busy(), self.report)
        self._refused: PeerRefused | None = None
        """Why the router has not taken this worker the last time it dialled."""
        self._failure: TriptychError | None = None
        """Why this worker cannot go on."""
        self._spans: dict[str, list[Span]] = {}
        """By request, on their way to the router."""
        self._sending: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------------ assembly

    def attach(
        self,
        service: Service,
        capacity: wire.Capacity,
        kv: KVLayout | None = None,
        *,
        transports: Iterable[str],
    ) -> None:
        """``kv``: layout of the KV that this worker hands over or takes, if it does.
        ``transports``: kinds by which it can read and be read."""
        self._service = service
        self.capacity = capacity
        self.kv = kv
        self.transports = tuple(transports)

    def post(self, path: str, kind: type[R], handler: Handler[R]) -> None:
        """``POST path``. A request whose cancel has come before it is answered with Cancelled."""

        async def unless_cancelled(message: R, channel: Channel) -> wire.Message:
            self._cancels.check(message.request_id)
            return await handler(message, channel)

        self._routes.append(post_route(path, kind, unless_cancelled, self.sessions, MAX_BODY))

    def route(self, route: BaseRoute) -> None:
        self._routes.append(route)

    @property
    def service(self) -> Service:
        assert self._service is not None, "attach() comes before serve()"
        return self._service

    # ------------------------------------------------------------------ life

    async def serve(self, *, handle_signals: bool = True) -> None:
        """Run until ``stop`` or, with ``handle_signals``, SIGTERM or SIGINT; then drain, for
        ``timeouts.drain`` at most or until it is asked once more.

        Raises PeerRefused when the router refuses this worker before it was ever registered, and
        what ``fail`` was called with.
        """
        if handle_signals:
            loop = asyncio.get_running_loop()
            for name in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(name, self.stop)
        server = HttpServer(self._app(), self._socket, self.timeouts.drain)
        await self.service.start()
        serving = asyncio.create_task(server.run_until_stopped())
        registering = asyncio.create_task(self._stay_registered())
        try:
            await self._stopping.wait()
            self._begin_drain()
            if not await self._drain.wait(self.timeouts.drain):
                logger.warning("ending although something still runs")
        finally:
            self._drain.close()
            await cancel_and_wait(registering)
            if self.router is not None:
                await self.router.close()
            await self.service.stop()
            server.stop()
            await serving
        if self._failure is not None:
            raise self._failure
        if self._refused is not None and not self.started.is_set():
            raise self._refused

    def stop(self) -> None:
        if self._stopping.is_set():
            self._drain.hurry()
        self._stopping.set()

    def fail(self, error: TriptychError) -> None:
        """This worker cannot go on: it ends, and ``serve`` raises the first such error. Its lost
        channels tell router and peers that its requests must go elsewhere. Idempotent."""
        if self._failure is None:
            logger.critical("this worker ends: %s", error.message)
            self._failure = error
            self._drain.hurry()  # nothing that runs here will come to its end
            self.stop()

    def _begin_drain(self) -> None:
        self._drain.begin(registered=self.router is not None and self.router.is_open)

    async def _stay_registered(self) -> None:
        """Keep a channel to the router, whatever happens to it."""
        wait = REDIAL_S
        while True:
            try:
                self.router = await self.dial(self.network.router, self._on_message, self._on_lost)
            except WorkerLost as exc:
                logger.info("router %s: %s; trying again", self.network.router, exc)
            except PeerRefused as exc:
                logger.error("router %s refuses this worker: %s", self.network.router, exc)
                self._refused = exc
                if not self.started.is_set():
                    self.stop()
                    return
            else:
                wait = REDIAL_S
                self._refused = None
                self.started.set()
                logger.info(
                    "%s at %s is registered with %s", self.role, self.url, self.network.router
                )
                await self.router.wait_closed()
                self.router = None
                logger.warning("the channel to router %s is lost", self.network.router)
                self._drain.unneeded()
                if self._drain.begun:
                    return
            await asyncio.sleep(wait)
            wait = min(2 * wait, REDIAL_MAX_S)

    async def dial(self, url: str, on_message: OnMessage, on_lost: OnLost) -> Channel:
        """A channel to the listener at ``url``, as this worker. PeerRefused, WorkerLost."""
        return await dial(
            url,
            self._hello,
            self.secrets.shared,
            self.timeouts,
            self.sessions,
            on_message,
            on_lost,
        )

    def _hello(self) -> wire.Hello:
        """How this worker introduces itself; the handshake adds nonce and proof."""
        return wire.Hello(
            version=wire.VERSION,
            release=__version__,
            role=self.role,
            worker_id=self.worker_id,
            url=self.url,
            nonce="",
            process=self.nonce,
            identity=self.identity,
            capacity=self.capacity,
            proof="",
            kv=self.kv,
            transports=self.transports,
        )

    # ------------------------------------------------------------------ to the router

    def report(self, message: wire.Message) -> None:
        """To the router; dropped when it is gone, since it has dropped the request too."""
        if self._spans and isinstance(message, wire.Tokens):
            self._send_spans()  # in the same frame, before an answer's last token
        if self.router is not None and self.router.is_open:
            self.router.send(message)

    def spans(self, request_id: str, spans: Sequence[Span]) -> None:
        """To the router, with the next tokens or after ``SPANS_S``."""
        if not spans:
            return
        pid = os.getpid()
        waiting = self._spans.setdefault(request_id, [])
        waiting += (msgspec.structs.replace(span, role=self.role, pid=pid) for span in spans)
        for span in spans:
            seconds = span.end - span.start
            record_span(self.role, span.name, seconds, span.nbytes, span.transport)
        if self._sending is None:
            loop = asyncio.get_running_loop()
            self._sending = loop.call_later(SPANS_S, self._send_spans)

    def _send_spans(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None
        waiting, self._spans = self._spans, {}
        for request_id, spans in waiting.items():
            self.report(wire.Spans(request_id=request_id, spans=tuple(spans)))

    # ------------------------------------------------------------------ from peers

    def _on_message(self, channel: Channel, message: wire.ChannelMessage) -> None:
        if isinstance(message, wire.Cancel):
            self._cancels.add(message.request_id)
            self.service.cancel(message.request_id)
        elif isinstance(message, wire.Drain):
            self._begin_drain()
        elif isinstance(message, wire.Unneeded):
            self._drain.unneeded()
        else:
            self.service.on_message(channel, message)

    def _on_lost(self, channel: Channel, reason: str) -> None:
        self.service.on_lost(channel)

    def _on_open(self, channel: Channel) -> None:
        logger.info("%s reads from this worker", channel.peer.worker_id)

    def _welcome(self) -> wire.Welcome:
        return wire.Welcome(
            session="",
            role=self.role,
            worker_id=self.worker_id,
            process=self.nonce,
            proof="",
            offers=self.service.offers(),
            kv=self.kv,
        )

    def _check(self, hello: wire.Hello) -> str | None:
        """Why a peer that dials this worker is refused; None when it is welcome."""
        if hello.release != __version__:
            return f"release {hello.release} dials release {__version__}"
        return wire.mismatch(self.identity, hello.identity)

    # ------------------------------------------------------------------ HTTP

    def _app(self) -> Starlette:
        listener = Listener(
            secret=self.secrets.shared,
            timeouts=self.timeouts,
            sessions=self.sessions,
            welcome=self._welcome,
            check=self._check,
            on_open=self._on_open,
            on_message=self._on_message,
            on_lost=self._on_lost,
        )
        return Starlette(
            routes=[
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/metrics", self._metrics),
                Route("/drain", self._drain_asked, methods=["POST"]),
                WebSocketRoute("/channel", listener.accept),
                *self._routes,
            ]
        )

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "role": self.role, "pid": os.getpid()})

    async def _ready(self, request: Request) -> Response:
        registered = self.router is not None and self.router.is_open
        reason = None if registered else f"not registered with router {self.network.router}"
        if not registered and self._refused is not None:
            reason = f"{reason}: {self._refused.message}"
        if self._drain.begun:
            reason = "drained" if self._drain.done else "draining"
        body = {"ready": reason is None, "role": self.role, "reason": reason}
        return JSONResponse(body, status_code=503 if reason else 200)

    async def _drain_asked(self, request: Request) -> Response:
        """``POST /drain``: take nothing new. Answers 200 when nothing runs any more, 202 if
        something still does after ``timeouts.drain``."""
        try:
            authorize_operator(request.headers, self.secrets)
        except Unauthorized as error:
            return JSONResponse({"error": error.message}, error.status)
        self._begin_drain()
        done = await self._drain.wait(self.timeouts.drain)
        return JSONResponse(drained(self.worker_id, done), 200 if done else 202)

    async def _metrics(self, request: Request) -> Response:
        return Response(exposition.render(), media_type=exposition.CONTENT_TYPE)
