"""Real servers on loopback for tests of the transfer plane: nothing here stands in for a socket."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.routing import BaseRoute, WebSocketRoute

from triptych import wire
from triptych.config import Timeouts, TransportName
from triptych.refs import KVLayout
from triptych.transfer.channel import Channel, OnLost, OnMessage, Sessions
from triptych.transfer.consumer import Consumer
from triptych.transfer.device_region import open_region
from triptych.transfer.handshake import Listener, dial
from triptych.transfer.producer import Producer
from triptych.transfer.transports.choice import open_transports
from triptych.transfer.transports.http import transfer_route

SECRET = b"0123456789abcdef0123456789abcdef"
CPU = torch.device("cpu")
FAST = replace(Timeouts(), heartbeat=0.05, silence=5.0, handshake=5.0)
IDENTITY = wire.ModelIdentity("tiny", "f" * 8, "float32", "pil")


class _Uvicorn(uvicorn.Server):
    def capture_signals(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@asynccontextmanager
async def serving(routes: list[BaseRoute], listener: socket.socket) -> AsyncIterator[_Uvicorn]:
    """A server of this event loop on an already bound socket."""
    config = uvicorn.Config(Starlette(routes=routes), log_config=None, lifespan="off")
    server = _Uvicorn(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:  # noqa: ASYNC110 (uvicorn offers no event)
        await asyncio.sleep(0.005)
    try:
        yield server
    finally:
        server.should_exit = True
        server.force_exit = True
        await task


def bound(port: int = 0) -> tuple[socket.socket, str]:
    """A socket on a free port and its base URL."""
    listener = socket.create_server(("127.0.0.1", port))
    return listener, f"http://127.0.0.1:{listener.getsockname()[1]}"


def hello(role: str = "prefill", identity: wire.ModelIdentity = IDENTITY) -> wire.Hello:
    return wire.Hello(
        version=wire.VERSION,
        release="0",
        role=role,
        worker_id=f"{role}-0",
        url="http://127.0.0.1:1",
        nonce="",
        process="p" * 8,
        identity=identity,
        capacity=wire.Capacity(),
        proof="",
    )


class Worker:
    """A producer with its server: what a role's stage is made of."""

    def __init__(
        self,
        nbytes: int = 1 << 20,
        transport: TransportName = "auto",
        timeouts: Timeouts = FAST,
        secret: bytes = SECRET,
        *,
        port: int = 0,
        advertised: str | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.socket, self.url = bound(port)
        self.url = advertised or self.url
        self.nonce = secrets.token_hex(16)
        self.timeouts = timeouts
        self.region = open_region(nbytes, self.nonce, device)
        self.sessions = Sessions()
        self.idle: list[int] = []
        self.producer = Producer(self.url, self.nonce, timeouts, self.idle.append)
        self.transports = open_transports(transport, self.region, url=self.url, host="127.0.0.1")
        self.kv: KVLayout | None = None
        self.channels: list[Channel] = []
        self.messages: list[wire.Message] = []
        self.lost: list[str] = []
        self.listener = Listener(
            secret=secret,
            timeouts=timeouts,
            sessions=self.sessions,
            welcome=self.welcome,
            check=self.check,
            on_open=self.channels.append,
            on_message=self.on_message,
            on_lost=self.on_lost,
        )

    def welcome(self) -> wire.Welcome:
        offers = tuple(transport.offer() for transport in self.transports.values())
        return wire.Welcome("", "encoder", "encoder-0", self.nonce, "", offers, self.kv)

    def check(self, peer: wire.Hello) -> str | None:
        if peer.identity == IDENTITY:
            return None
        return f"this worker serves {IDENTITY.name}, the peer {peer.identity.name}"

    def on_message(self, channel: Channel, message: wire.ChannelMessage) -> None:
        self.messages.append(message)
        self.producer.handle(channel, message)

    def on_lost(self, channel: Channel, reason: str) -> None:
        self.lost.append(reason)
        self.producer.session_lost(channel.session)

    def routes(self) -> list[BaseRoute]:
        return [
            WebSocketRoute("/channel", self.listener.accept),
            transfer_route(self.region, self.sessions, self.producer.may_read),
        ]

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[Worker]:
        async with serving(self.routes(), self.socket):
            try:
                yield self
            finally:
                for channel in [channel for channel in self.channels if channel.is_open]:
                    await channel.close()
        self.close()

    def close(self) -> None:
        self.producer.close()
        for transport in self.transports.values():
            transport.close()
        self.region.close()
        self.socket.close()


class Puller:
    """A consumer with memory of its own."""

    def __init__(
        self,
        nbytes: int = 1 << 20,
        transport: TransportName = "auto",
        timeouts: Timeouts = FAST,
        secret: bytes = SECRET,
    ) -> None:
        self.region = open_region(nbytes, secrets.token_hex(16), CPU)
        self.area = self.region.carve(nbytes)
        self.transports = open_transports(
            transport, self.region, url="http://127.0.0.1:1", host="127.0.0.1"
        )
        self.dialled: list[Channel] = []
        self._dial = partial(dial, hello=hello, secret=secret, timeouts=timeouts, sessions=None)
        self.consumer = Consumer(self.dial, self.region, self.transports, timeouts)

    async def dial(self, url: str, on_message: OnMessage, on_lost: OnLost) -> Channel:
        channel = await self._dial(url, on_message=on_message, on_lost=on_lost)
        self.dialled.append(channel)
        return channel

    async def close(self) -> None:
        await self.consumer.close()
        for transport in self.transports.values():
            transport.close()
        self.region.close()


@contextlib.contextmanager
def refusing() -> Iterator[str]:
    """URL of a port on which nothing listens."""
    listener, url = bound()
    listener.close()
    yield url
