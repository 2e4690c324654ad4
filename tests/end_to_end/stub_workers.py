"""Workers that speak the real protocol over real sockets and compute nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from starlette.applications import Starlette
from starlette.routing import BaseRoute

from triptych import __version__, wire
from triptych.config import Secrets, Timeouts
from triptych.errors import TriptychError
from triptych.refs import EmbeddingRef, KVLayout, KVRef
from triptych.request import ItemMeta, Sampling, Span, TokenEvent
from triptych.stage.http import HttpServer, bind, post_route, url_of
from triptych.transfer.channel import Channel, Sessions
from triptych.transfer.handshake import dial

SECRETS = Secrets(shared=b"a secret of sixteen bytes or more")
IDENTITY = wire.ModelIdentity(name="tiny", fingerprint="f" * 16, dtype="float32", processor="pil")
MODEL = wire.ModelIdentity(name="tiny", fingerprint="", dtype="", processor="")
"""As the router knows it."""
TIMEOUTS = Timeouts(
    connect=2, handshake=2, heartbeat=0.2, silence=2, rpc=2, pool=2, worker=0.5, media=2, drain=1
)
MARKER = "<|image_pad|>"
ROWS = 4
"""Rows of every image."""


@dataclass
class StubWorker:
    """``answer``: the tokens of every answer. ``finish``: how its last one ends if it is shorter
    than max_tokens."""

    role: str
    number: int = 0
    router: str = ""
    identity: wire.ModelIdentity = IDENTITY
    capacity: wire.Capacity = field(default_factory=lambda: wire.Capacity(max_model_len=2048))
    timeouts: Timeouts = TIMEOUTS
    rows: int = ROWS
    """Of every image."""
    kv: KVLayout | None = None
    transports: tuple[str, ...] = ("shm", "http")
    release: str = __version__
    secrets: Secrets = SECRETS
    answer: Sequence[int] = ()
    finish: str = "stop"
    pause_s: float = 0.0
    """Between two tokens."""
    known: set[str] = field(default_factory=set)
    cached: bool = False
    """It says so of every image."""
    refuse: dict[str, TriptychError] = field(default_factory=dict)
    """Path → what it answers instead."""
    on_encode: Callable[[StubWorker, wire.EncodeRequest], None] | None = None
    on_start: Callable[[StubWorker, str], bool] | None = None
    """Called instead of sending tokens; True: the tokens follow all the same."""
    calls: list[tuple[str, wire.Message]] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    cancelled_at: asyncio.Event = field(default_factory=asyncio.Event)
    told: list[wire.ChannelMessage] = field(default_factory=list)
    """About draining, by the router."""
    hold: asyncio.Event | None = None
    """POST requests wait for it."""

    @property
    def worker_id(self) -> str:
        return f"{self.role}-{self.number}"

    def seen(self, path: str) -> list[wire.Message]:
        return [message for found, message in self.calls if found == path]

    # ------------------------------------------------------------------ life

    @asynccontextmanager
    async def running(self) -> AsyncIterator[StubWorker]:
        self.sessions = Sessions()
        self.tasks: set[asyncio.Task[None]] = set()
        sock = bind("127.0.0.1", 0)
        self.url = url_of(sock)
        self.server = HttpServer(Starlette(routes=self._routes()), sock, 1)
        serving = asyncio.create_task(self.server.run_until_stopped())
        try:
            while not self.server.started:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            self.channel = await dial(
                self.router,
                self._hello,
                self.secrets.shared,
                self.timeouts,
                self.sessions,
                self._on_message,
                lambda channel, reason: None,
            )
            yield self
            await self.channel.close()
        finally:
            for task in self.tasks:
                task.cancel()
            self.server.stop()
            await serving

    async def die(self) -> None:
        """Channel and open connections go, as when the process is killed."""
        await self.channel.close()
        self.server.force_exit = True
        self.server.stop()

    def _hello(self) -> wire.Hello:
        return wire.Hello(
            version=wire.VERSION,
            release=self.release,
            role=self.role,
            worker_id=self.worker_id,
            url=self.url,
            nonce="",
            process="0" * 32,
            identity=self.identity,
            capacity=self.capacity,
            proof="",
            kv=self.kv,
            transports=self.transports,
        )

    def _on_message(self, channel: Channel, message: wire.ChannelMessage) -> None:
        if isinstance(message, wire.Cancel):
            self.cancelled.append(message.request_id)
            self.cancelled_at.set()
        elif isinstance(message, wire.Drain | wire.Unneeded):
            self.told.append(message)

    def _routes(self) -> list[BaseRoute]:
        def post(path: str, kind: type[wire.Message], handler: object) -> BaseRoute:
            async def counted(message: wire.Message, channel: Channel) -> wire.Message:
                self.calls.append((path, message))
                if self.hold is not None:
                    await self.hold.wait()
                if path in self.refuse:
                    raise self.refuse[path]
                return handler(message)  # type: ignore[operator, no-any-return]

            return post_route(path, kind, counted, self.sessions, 1 << 28)

        return [
            post("/encode", wire.EncodeRequest, self._encode),
            post("/generate", wire.PrefillRequest, self._generate),
            post("/prefill", wire.PrefillRequest, self._prefill),
            post("/reserve", wire.ReserveRequest, lambda m: wire.ReserveResponse(n_blocks=1)),
            post("/decode", wire.DecodeRequest, self._decode),
        ]

    # ------------------------------------------------------------------ what the roles do

    def _encode(self, message: wire.EncodeRequest) -> wire.Message:
        found = [self._item(item) for item in message.items]
        if self.on_encode is not None and not any(item.miss for item in found):
            self.on_encode(self, message)
        return wire.EncodeResponse(items=tuple(found))

    def _item(self, item: wire.EncodeItem) -> wire.EncodedItem:
        if item.data is None and item.digest not in self.known:
            return wire.EncodedItem(index=item.index, miss=True)
        if item.data == b"not an image":
            return wire.EncodedItem(index=item.index, error="BadMedia", reason="no such format")
        self.known.add(item.digest)
        meta = ItemMeta(
            key=item.digest,
            text=MARKER * self.rows,
            rows=self.rows,
            grid=(1, 4, 4),
            planes=1,
            width=8,
            dtype="float32",
        )
        ref = EmbeddingRef(
            owner=self.url,
            nonce="",
            slot=item.index,
            generation=1,
            nbytes=meta.nbytes,
            key=meta.key,
            dtype=meta.dtype,
            shape=meta.shape,
        )
        return wire.EncodedItem(index=item.index, cached=self.cached, meta=meta, ref=ref)

    def _generate(self, message: wire.PrefillRequest) -> wire.Message:
        self._send_soon(message.request_id, message.sampling, len(message.resumed))
        return wire.Accepted()

    def _prefill(self, message: wire.PrefillRequest) -> wire.Message:
        start = len(message.resumed)
        self._send_soon(message.request_id, message.sampling, start, only_one=True)
        n_tokens = len(message.token_ids) + start
        ref = KVRef(
            owner=self.url,
            nonce="",
            slot=1,
            generation=1,
            nbytes=n_tokens,
            n_tokens=n_tokens,
            block_size=1,
            block_nbytes=1,
        )
        return wire.PrefillResponse(kv=ref)

    def _decode(self, message: wire.DecodeRequest) -> wire.Message:
        self._send_soon(message.request_id, message.sampling, len(message.resumed) + 1)
        return wire.Accepted()

    def _send_soon(
        self, request_id: str, sampling: Sampling, start: int, *, only_one: bool = False
    ) -> None:
        if self.on_start is not None and not self.on_start(self, request_id):
            return
        events = self.events(request_id, sampling)[start:]
        task = asyncio.create_task(self._send(events[:1] if only_one else events))
        self.tasks.add(task)

    def events(self, request_id: str, sampling: Sampling) -> list[TokenEvent]:
        tokens = list(self.answer[: sampling.max_tokens])
        cut = len(tokens) == sampling.max_tokens
        if not cut:
            tokens.append(sampling.stop_ids[0])
        finish = "length" if cut else "stop"
        last = len(tokens) - 1
        return [
            TokenEvent(request_id, i, token, finish=finish if i == last else "", logprob=-0.5)
            for i, token in enumerate(tokens)
        ]

    async def _send(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            await asyncio.sleep(self.pause_s)
            self.channel.send(wire.Tokens(tokens=(event,)))
        if events:
            span = Span(name="decode", start=1.0, end=2.0, role=self.role, pid=7)
            self.channel.send(wire.Spans(request_id=events[0].request_id, spans=(span,)))

    def report(self, request_id: str, error: TriptychError) -> None:
        """What a stage that failed tells its router."""
        self.channel.send(
            wire.Failed(
                request_id=request_id,
                stage=self.role,
                error=type(error).__name__,
                reason=error.message,
                item=-1 if error.item is None else error.item,
                retryable=error.retryable,
            )
        )
