"""The other process of ``triptych bench transfer``: lends ready memory to whoever asks."""

from __future__ import annotations

import asyncio
import secrets
from multiprocessing.connection import Connection

import torch
import uvloop
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from triptych import __version__, wire
from triptych.bench.places import device_of, fill
from triptych.config import Timeouts, TransportName
from triptych.errors import ConfigError
from triptych.refs import AnyRef
from triptych.stage.http import HttpServer, bind, url_of
from triptych.transfer.channel import Channel, Sessions
from triptych.transfer.device_region import open_region
from triptych.transfer.handshake import Listener
from triptych.transfer.producer import Producer
from triptych.transfer.region import round_up
from triptych.transfer.transports.choice import open_transports
from triptych.transfer.transports.http import transfer_route

IDENTITY = wire.ModelIdentity("bench", "bench", "float32", "")
HOLDER = "bench"


class Started(wire.Message, frozen=True, tag="bench-started"):
    """First on the pipe: this process is ready, or why it is not."""

    error: str = ""
    url: str = ""
    offers: tuple[wire.TransportOffer, ...] = ()
    offset: int = 0
    """Of the content in the region."""


class Lend(wire.Message, frozen=True, tag="bench-lend"):
    """Ask for a slot of ``pieces`` equal pieces that are all ready; the answer is a Claim.

    0 pieces: an embedding, which can be borrowed.
    """

    nbytes: int
    pieces: int


def run(pipe: Connection, secret: bytes, name: TransportName, device: str, nbytes: int) -> None:
    """Entry of the child process. Ends when ``pipe`` closes."""
    torch.set_num_threads(1)
    try:
        lender = _Lender(pipe, secret, name, device_of(device), nbytes)
    except ConfigError as error:
        pipe.send_bytes(wire.encode(Started(error.message)))
    else:
        uvloop.run(lender.serve())


class _Lender:
    def __init__(
        self, pipe: Connection, secret: bytes, name: TransportName, device: torch.device,
        nbytes: int,
    ) -> None:  # fmt: skip
        self._pipe = pipe
        self._socket = bind("127.0.0.1", 0)
        self._socket.listen()  # whoever dials before the server runs, waits
        self._url = url = url_of(self._socket)
        self._nonce = secrets.token_hex(16)
        timeouts = Timeouts()
        area = round_up(nbytes)
        self._region = open_region(area, self._nonce, device)
        self._offset = self._region.carve(area)
        fill(self._region.tensor(self._offset, (area,), torch.uint8))
        self._producer = Producer(url, self._nonce, timeouts, self._close_slot)
        self._transports = open_transports(name, self._region, url=url, host="127.0.0.1")
        sessions = Sessions()
        listener = Listener(
            secret=secret,
            timeouts=timeouts,
            sessions=sessions,
            welcome=self._welcome,
            check=lambda hello: wire.mismatch(IDENTITY, hello.identity),
            on_open=lambda channel: None,
            on_message=lambda channel, message: self._on_message(channel, message),
            on_lost=lambda channel, reason: self._producer.session_lost(channel.session),
        )
        route = transfer_route(self._region, sessions, self._producer.may_read)
        app = Starlette(routes=[WebSocketRoute("/channel", listener.accept), route])
        self._server = HttpServer(app, self._socket, drain_s=1.0)

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        closed = asyncio.Event()

        def asked() -> None:
            try:
                lend = wire.decode(self._pipe.recv_bytes(), Lend)
            except EOFError:
                loop.remove_reader(self._pipe.fileno())
                closed.set()
            else:
                self._pipe.send_bytes(wire.encode(wire.Claim(0, self._lend(lend), "")))

        loop.add_reader(self._pipe.fileno(), asked)
        serving = asyncio.create_task(self._server.run_until_stopped())
        started = Started(url=self._url, offers=self._offers(), offset=self._offset)
        self._pipe.send_bytes(wire.encode(started))
        await closed.wait()
        self._producer.close()
        self._server.stop()
        await serving
        for transport in self._transports.values():
            transport.close()
        self._region.close()

    def _lend(self, lend: Lend) -> AnyRef:
        if lend.pieces == 0:
            piece, shape = wire.Piece(self._offset, lend.nbytes), (1, 1, lend.nbytes)
            item = self._producer.lend_embedding(
                piece, "bench", "uint8", shape, holder=HOLDER, request_id=HOLDER
            )
            self._producer.ready(item.slot, [piece], last=True)
            return item
        size = lend.nbytes // lend.pieces
        ref = self._producer.lend_kv(lend.pieces, 1, size, holder=HOLDER, request_id=HOLDER)
        ready = [wire.Piece(self._offset + i * size, size) for i in range(lend.pieces)]
        self._producer.ready(ref.slot, ready, last=True)
        return ref

    def _close_slot(self, slot: int) -> None:
        self._producer.close_slot(slot)

    def _on_message(self, channel: Channel, message: wire.ChannelMessage) -> None:
        self._producer.handle(channel, message)

    def _offers(self) -> tuple[wire.TransportOffer, ...]:
        return tuple(transport.offer() for transport in self._transports.values())

    def _welcome(self) -> wire.Welcome:
        return wire.Welcome(
            session="",
            role="encoder",
            worker_id="bench-producer",
            process=self._nonce,
            proof="",
            offers=self._offers(),
        )


def hello() -> wire.Hello:
    """How the benchmark's consumer introduces itself."""
    return wire.Hello(
        version=wire.VERSION,
        release=__version__,
        role="prefill",
        worker_id="bench-consumer",
        url="http://127.0.0.1:1",
        nonce="",
        process=secrets.token_hex(16),
        identity=IDENTITY,
        capacity=wire.Capacity(),
        proof="",
    )
