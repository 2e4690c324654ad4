"""Channels over real sockets: an aiohttp dialler against a uvicorn listener on this loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import aiohttp
import msgspec
import pytest
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from tests.transfer_rig import FAST, IDENTITY, SECRET, Worker, bound, hello, refusing, serving
from triptych import wire
from triptych.config import Timeouts
from triptych.errors import PeerRefused, PeerUnproven, WorkerLost
from triptych.transfer import channel as channels
from triptych.transfer.channel import Channel, Sessions
from triptych.transfer.handshake import channel_address, dial, proof_of

LONG = 5.0


class Dialler:
    def __init__(self) -> None:
        self.messages: list[wire.ChannelMessage] = []
        self.lost: list[str] = []
        self.sessions = Sessions()

    async def dial(
        self,
        url: str,
        secret: bytes = SECRET,
        timeouts: Timeouts = FAST,
        who: Callable[[], wire.Hello] = hello,
    ) -> Channel:
        return await dial(
            url,
            who,
            secret,
            timeouts,
            self.sessions,
            lambda _, message: self.messages.append(message),
            lambda _, reason: self.lost.append(reason),
        )


@asynccontextmanager
async def raw(worker: Worker) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{worker.url}/channel") as socket,
    ):
        yield socket


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LONG):
        while not condition():  # noqa: ASYNC110 (of another thread or task)
            await asyncio.sleep(0.005)


async def test_both_ends_know_each_other_and_share_a_token() -> None:
    async with Worker().serve() as worker:
        dialler = Dialler()
        channel = await dialler.dial(worker.url)
        await until(lambda: bool(worker.channels))
        (other,) = worker.channels
        assert channel.session == other.session
        assert channel.token == other.token
        assert isinstance(channel.peer, wire.Welcome)
        assert channel.peer.process == worker.nonce
        assert isinstance(other.peer, wire.Hello)
        assert other.peer.identity == IDENTITY
        assert worker.sessions.get(other.session) is other
        assert dialler.sessions.get(channel.session) is channel
        second = await dialler.dial(worker.url)
        assert second.session != channel.session
        assert second.token != channel.token
        await channel.close()
        await second.close()


async def test_messages_go_both_ways_in_order() -> None:
    async with Worker().serve() as worker:
        dialler = Dialler()
        channel = await dialler.dial(worker.url)
        for number in range(500):
            channel.send(wire.Release(number))
        await until(lambda: len(worker.messages) >= 500)
        cancels = [wire.Cancel(f"r{number}") for number in range(500)]
        for message in cancels:
            worker.channels[0].send(message)
        await until(lambda: len(dialler.messages) >= 500)
        beats = (wire.Ping, wire.Pong)
        got = [message for message in worker.messages if not isinstance(message, beats)]
        assert got == [wire.Release(number) for number in range(500)]
        assert [m for m in dialler.messages if not isinstance(m, beats)] == cancels
        await channel.close()


async def test_close_sends_what_is_queued_and_tells_both_ends_once() -> None:
    async with Worker().serve() as worker:
        dialler = Dialler()
        channel = await dialler.dial(worker.url)
        channel.send(wire.Cancel("last words"))
        await channel.close()
        await channel.close()
        assert not channel.is_open
        await until(lambda: bool(worker.lost))
        assert wire.Cancel("last words") in worker.messages
        assert dialler.lost == ["closed here"]
        assert len(worker.lost) == 1
        assert dialler.sessions.get(channel.session) is None
        await until(lambda: worker.sessions.get(channel.session) is None)
        channel.send(wire.Cancel("too late"))
        await channel.wait_closed()


async def test_the_listener_closes() -> None:
    async with Worker().serve() as worker:
        dialler = Dialler()
        channel = await dialler.dial(worker.url)
        await until(lambda: bool(worker.channels))
        await worker.channels[0].close()
        async with asyncio.timeout(LONG):
            await channel.wait_closed()
        assert worker.lost == ["closed here"]
        assert len(dialler.lost) == 1


async def test_heartbeats_keep_an_idle_channel() -> None:
    timeouts = replace(FAST, heartbeat=0.03, silence=0.3)
    async with Worker(timeouts=timeouts).serve() as worker:
        dialler = Dialler()
        channel = await dialler.dial(worker.url, timeouts=timeouts)
        await asyncio.sleep(1.0)
        assert channel.is_open
        assert worker.channels[0].is_open
        assert wire.Ping() in worker.messages
        assert wire.Pong() in dialler.messages
        await channel.close()


async def test_a_silent_dialler_is_lost() -> None:
    timeouts = replace(FAST, heartbeat=0.05, silence=0.2)
    async with Worker(timeouts=timeouts).serve() as worker:
        dialler = Dialler()
        mute = replace(FAST, heartbeat=100.0, silence=100.0)
        channel = await dialler.dial(worker.url, timeouts=mute)
        await until(lambda: bool(worker.lost))
        assert worker.lost == ["silent for more than 0.2 s"]
        async with asyncio.timeout(LONG):
            await channel.wait_closed()


async def test_a_silent_listener_is_lost() -> None:
    """It shakes hands, then says nothing more."""
    worker = Worker()
    held: list[WebSocket] = []

    async def shake_hands_only(websocket: WebSocket) -> None:
        listener = replace(worker.listener, on_open=lambda channel: setattr(channel, "send", mute))
        held.append(websocket)
        await listener.accept(websocket)

    def mute(message: wire.Message) -> None:
        pass

    async with serving([WebSocketRoute("/channel", shake_hands_only)], worker.socket):
        dialler = Dialler()
        channel = await dialler.dial(
            worker.url, timeouts=replace(FAST, heartbeat=0.05, silence=0.2)
        )
        await until(lambda: bool(dialler.lost))
        assert dialler.lost == ["silent for more than 0.2 s"]
        await channel.wait_closed()
    worker.close()


async def test_wrong_secret_is_refused_by_either_side() -> None:
    """Another attempt elsewhere makes sense: a dead worker's address may have a new owner."""
    async with Worker(secret=b"x" * 32).serve() as worker:
        with pytest.raises(PeerUnproven, match="did not prove") as refusal:
            await Dialler().dial(worker.url)
        assert refusal.value.retryable
        assert worker.channels == []


async def test_a_listener_that_does_not_know_the_secret_is_found_out() -> None:
    async def impostor(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_bytes(wire.encode(wire.Challenge(wire.VERSION, "0" * 32)))
        await websocket.receive_bytes()
        await websocket.send_bytes(wire.encode(wire.Welcome("s", "encoder", "w", "p", "f" * 64)))
        await websocket.receive()

    listener, url = bound()
    async with serving([WebSocketRoute("/channel", impostor)], listener):
        with pytest.raises(PeerRefused, match="did not prove"):
            await Dialler().dial(url)


@pytest.mark.parametrize("field", ["role", "worker_id", "url", "process"])
async def test_the_proof_covers_what_the_hello_claims(field: str) -> None:
    """One byte of the hello is changed on its way."""
    async with Worker().serve() as worker, raw(worker) as socket:
        challenge = wire.decode(await socket.receive_bytes(), wire.Challenge)
        nonces = (challenge.nonce, "a" * 32)
        signed = msgspec.structs.replace(hello(), nonce="a" * 32)
        proof = proof_of(SECRET, "dial", nonces, wire.encode(signed).hex())
        sent = msgspec.structs.replace(signed, proof=proof, **{field: "evil"})
        await socket.send_bytes(wire.encode(sent))
        answer = wire.decode_channel(await socket.receive_bytes())
    assert isinstance(answer, wire.Refused)
    assert "did not prove" in answer.reason
    assert worker.channels == []


async def test_another_version_is_refused_naming_both(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Worker().serve() as worker:
        async with raw(worker) as socket:
            await socket.receive_bytes()
            other = {"type": "hello", "version": 99, "news": [1, 2]}
            await socket.send_bytes(msgspec.msgpack.encode(other))
            answer = wire.decode_channel(await socket.receive_bytes())
        assert isinstance(answer, wire.Refused)
        assert "version 99" in answer.reason
        assert f"version {wire.VERSION}" in answer.reason

    async def newer(websocket: WebSocket) -> None:
        await websocket.accept()
        text = {"type": "challenge", "version": 7, "nonce": "0" * 32, "more": True}
        await websocket.send_bytes(msgspec.msgpack.encode(text))
        await websocket.receive()

    listener, url = bound()
    async with serving([WebSocketRoute("/channel", newer)], listener):
        with pytest.raises(PeerRefused, match=f"version 7, this is version {wire.VERSION}"):
            await Dialler().dial(url)


async def test_another_model_is_refused_naming_both() -> None:
    other = wire.ModelIdentity("another", "0", "float32", "pil")
    async with Worker().serve() as worker:
        with pytest.raises(PeerRefused, match="serves tiny, the peer another"):
            await Dialler().dial(worker.url, who=partial(hello, identity=other))


@pytest.mark.parametrize(
    "frame",
    [b"", b"\xc1", b"not msgpack", msgspec.msgpack.encode({"type": "hello"}), b"x" * 70_000],
)
async def test_garbage_instead_of_a_hello(frame: bytes) -> None:
    async with Worker().serve() as worker:
        async with raw(worker) as socket:
            await socket.receive_bytes()
            await socket.send_bytes(frame)
            answer = await socket.receive()
            assert answer.type in (aiohttp.WSMsgType.BINARY, aiohttp.WSMsgType.CLOSE)
        assert worker.channels == []
        channel = await Dialler().dial(worker.url)  # the server goes on
        await channel.close()


@pytest.mark.parametrize(
    "frame", [b"garbage", wire.encode(wire.Challenge(1, "x")), wire.encode(wire.Refused("no"))]
)
async def test_what_does_not_belong_on_an_open_channel_ends_it(frame: bytes) -> None:
    async with Worker().serve() as worker:
        dialler = Dialler()
        channel = await dialler.dial(worker.url)
        await channel._socket.send(frame)
        await until(lambda: bool(worker.lost))
        assert "not a message" in worker.lost[0] or "after the handshake" in worker.lost[0]
        await until(lambda: bool(dialler.lost))


async def test_a_bug_in_a_handler_ends_the_channel_aloud(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Worker().serve() as worker:
        dialler = Dialler()
        channel = await dialler.dial(worker.url)

        def broken(*_: object) -> None:
            raise RuntimeError("our bug")

        await until(lambda: bool(worker.channels))
        worker.channels[0]._on_message = broken
        with caplog.at_level(logging.ERROR):
            channel.send(wire.Cancel("x"))
            await until(lambda: bool(worker.lost))
        assert "handling Cancel failed: our bug" in worker.lost[0]
        assert "our bug" in caplog.text
        await channel.wait_closed()


async def test_a_peer_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "MAX_BACKLOG", 100)
    async with Worker().serve() as worker:
        dialler = Dialler()
        channel = await dialler.dial(worker.url)
        for number in range(101):
            channel.send(wire.Release(number))
        assert not channel.is_open
        async with asyncio.timeout(LONG):
            await channel.wait_closed()
        assert len(dialler.lost) == 1


async def test_nobody_there() -> None:
    with refusing() as url, pytest.raises(WorkerLost, match=url):
        await Dialler().dial(url)


async def test_a_listener_that_never_speaks_is_given_up() -> None:
    listener, url = bound()  # the kernel takes the connection, nobody answers
    with listener, pytest.raises(WorkerLost):
        await Dialler().dial(url, timeouts=replace(FAST, handshake=0.1))


@pytest.mark.parametrize(
    "url",
    ["", "file:///etc/passwd", "ftp://a:1", "http://", "//host", "http://user:pw@host", "unix:/x",
     "http://host:99999", "http://host/?q", "http://host/#f", "gopher://x", "http://[::1"],
)  # fmt: skip
async def test_only_plain_http_addresses_are_dialled(url: str) -> None:
    with pytest.raises(PeerRefused, match="not the address of a worker"):
        await Dialler().dial(url)


def test_addresses_of_channels() -> None:
    assert channel_address("http://host:1/") == "http://host:1/channel"
    assert channel_address("https://host/base") == "https://host/base/channel"


async def test_http_requests_of_a_session() -> None:
    async with Worker().serve() as worker:
        dialler = Dialler()
        channel = await dialler.dial(worker.url)
        other = await dialler.dial(worker.url)
        good = {wire.SESSION_HEADER: channel.session, wire.TOKEN_HEADER: channel.token}
        assert dialler.sessions.authorize(good) is channel
        for bad in (
            {},
            {**good, wire.TOKEN_HEADER: other.token},
            {**good, wire.SESSION_HEADER: "unknown"},
            {**good, wire.TOKEN_HEADER: ""},
            {**good, wire.TOKEN_HEADER: "ä"},
        ):
            with pytest.raises(PeerRefused, match="belongs to no session"):
                dialler.sessions.authorize(bad)
        await channel.close()
        with pytest.raises(PeerRefused):
            dialler.sessions.authorize(good)
        await other.close()
