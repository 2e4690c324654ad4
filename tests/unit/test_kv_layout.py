"""Two workers whose KV lies differently never get as far as a ref. Over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import aiohttp
import msgspec
import pytest
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from tests.transfer_pair import until
from tests.transfer_rig import FAST, IDENTITY, SECRET, Puller, Worker, bound, hello, serving
from triptych import wire
from triptych.config import NetworkConfig, Secrets
from triptych.errors import PeerRefused
from triptych.refs import KVLayout, KVRef, kv_mismatch
from triptych.stage import Stage
from triptych.transfer.channel import Channel, Sessions
from triptych.transfer.handshake import Listener, dial, proof_of

LAYOUT = KVLayout(
    order="block,layer,kv,token,head,dim",
    block_size=16,
    block_nbytes=4096,
    layers=2,
    kv_heads=2,
    head_dim=8,
    dtype="float32",
    tp_size=1,
)
CHANGES: list[dict[str, object]] = [
    {"order": "layer,block,kv,token,head,dim"},
    {"block_size": 32, "block_nbytes": 8192},
    {"layers": 3},
    {"kv_heads": 4},
    {"head_dim": 4},
    {"dtype": "bfloat16"},
    {"tp_size": 2},
]


def changed(change: dict[str, object]) -> KVLayout:
    return msgspec.structs.replace(LAYOUT, **change)


def decode(kv: KVLayout | None) -> wire.Hello:
    return msgspec.structs.replace(hello("decode"), kv=kv)


async def open_channel(url: str, kv: KVLayout | None) -> Channel:
    return await dial(
        url, partial(decode, kv), SECRET, FAST, None, lambda *_: None, lambda *_: None
    )


def named(change: dict[str, object], layout: KVLayout) -> str:
    """The fields that differ, and no other."""
    return ", ".join(f"{field} {getattr(layout, field)}" for field in change)


@pytest.mark.parametrize("change", CHANGES)
async def test_the_producer_refuses_another_layout_naming_both(change: dict[str, object]) -> None:
    async with Worker().serve() as worker:
        worker.kv = LAYOUT
        theirs = changed(change)
        with pytest.raises(PeerRefused) as refusal:
            await open_channel(worker.url, theirs)
        assert refusal.value.message == (
            f"{worker.url}: refused: the KV layout of decode-0 ({named(change, theirs)}) "
            f"is not that of encoder-0 ({named(change, LAYOUT)})"
        )
        assert not refusal.value.retryable
        assert worker.channels == [] and worker.sessions._channels == {}


@pytest.mark.parametrize("change", CHANGES)
async def test_the_consumer_looks_for_itself(change: dict[str, object]) -> None:
    """At a listener that knows the secret and welcomes everybody."""
    theirs = changed(change)
    left = asyncio.Event()

    async def trusting(websocket: WebSocket) -> None:
        await websocket.accept()
        challenge = wire.Challenge(wire.VERSION, "0" * 32)
        await websocket.send_bytes(wire.encode(challenge))
        who = wire.decode(await websocket.receive_bytes(), wire.Hello)
        welcome = wire.Welcome("s", "prefill", "prefill-7", "p", "", (), theirs)
        nonces = (challenge.nonce, who.nonce)
        proof = proof_of(SECRET, "listen", nonces, wire.encode(welcome).hex())
        await websocket.send_bytes(wire.encode(msgspec.structs.replace(welcome, proof=proof)))
        assert (await websocket.receive())["type"] == "websocket.disconnect"
        left.set()

    listener, url = bound()
    async with serving([WebSocketRoute("/channel", trusting)], listener):
        with pytest.raises(PeerRefused) as refusal:
            await open_channel(url, LAYOUT)
        assert refusal.value.message == (
            f"{url}: the KV layout of prefill-7 ({named(change, theirs)}) "
            f"is not that of decode-0 ({named(change, LAYOUT)})"
        )
        async with asyncio.timeout(5):
            await left.wait()  # the connection is not kept


@pytest.mark.parametrize(("ours", "theirs"), [(LAYOUT, LAYOUT), (None, LAYOUT), (LAYOUT, None)])
async def test_the_same_layout_and_none_are_welcome(
    ours: KVLayout | None, theirs: KVLayout | None
) -> None:
    async with Worker().serve() as worker:
        worker.kv = ours
        channel = await open_channel(worker.url, theirs)
        assert channel.is_open
        await channel.close()


async def test_the_proof_covers_the_layout() -> None:
    async with (
        Worker().serve() as worker,
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{worker.url}/channel") as socket,
    ):
        challenge = wire.decode(await socket.receive_bytes(), wire.Challenge)
        signed = msgspec.structs.replace(decode(changed({"layers": 3})), nonce="a" * 32)
        proof = proof_of(SECRET, "dial", (challenge.nonce, "a" * 32), wire.encode(signed).hex())
        sent = msgspec.structs.replace(signed, proof=proof, kv=LAYOUT)
        await socket.send_bytes(wire.encode(sent))
        answer = wire.decode_channel(await socket.receive_bytes())
    assert isinstance(answer, wire.Refused)
    assert "did not prove" in answer.reason


async def test_a_pull_from_another_layout_claims_nothing() -> None:
    async with Worker().serve() as worker:
        worker.kv = LAYOUT
        puller = Puller()
        puller._dial = partial(
            dial, hello=partial(decode, changed({"block_size": 8, "block_nbytes": 2048})),
            secret=SECRET, timeouts=FAST, sessions=None,
        )  # fmt: skip
        holder = await open_channel(worker.url, None)
        ref = worker.producer.lend_kv(16, 16, 4096, holder=holder.session, request_id="r")
        for _ in range(2):  # and it is tried anew every time
            with pytest.raises(PeerRefused, match=r"block_size 8.*block_size 16"):
                await puller.consumer.pull(
                    ref, "r", lambda first, pieces: [puller.area], lambda *_: None, 5.0
                )
        assert isinstance(ref, KVRef)
        assert puller.consumer._producers == {} and puller.consumer._by_session == {}
        assert not any(isinstance(message, wire.Claim) for message in worker.messages)
        assert worker.producer.leases(ref.slot) == 1
        worker.producer.cancel("r")
        assert worker.producer.n_leases == 0
        await holder.close()
        await puller.close()


# ------------------------------------------------------------------ a worker at its router


class Idle:
    """A role that does nothing."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def offers(self) -> tuple[wire.TransportOffer, ...]:
        return ()

    def on_message(self, channel: Channel, message: wire.ChannelMessage) -> None: ...

    def on_lost(self, channel: Channel) -> None: ...

    def cancel(self, request_id: str) -> None: ...

    def busy(self) -> bool:
        return False


@asynccontextmanager
async def worker_of(router: str) -> AsyncIterator[Stage]:
    stage = Stage(
        "decode",
        network=NetworkConfig(router=router),
        timeouts=FAST,
        secrets=Secrets(shared=SECRET),
        identity=IDENTITY,
    )
    stage.attach(Idle(), wire.Capacity(), LAYOUT, transports=())
    running = asyncio.create_task(stage.serve(handle_signals=False))
    try:
        async with asyncio.timeout(5):
            await stage.started.wait()
        yield stage
    finally:
        stage.stop()
        await running


async def test_a_worker_says_why_its_router_does_not_take_it_back() -> None:
    channels: list[Channel] = []
    other = [LAYOUT]
    listener = Listener(
        secret=SECRET,
        timeouts=FAST,
        sessions=Sessions(),
        welcome=lambda: wire.Welcome("", "router", "router-0", "p", ""),
        check=lambda who: kv_mismatch(other[0], "prefill-0", who.kv, who.worker_id),
        on_open=channels.append,
        on_message=lambda channel, message: None,
        on_lost=lambda channel, reason: None,
    )
    sock, url = bound()
    async with (
        serving([WebSocketRoute("/channel", listener.accept)], sock),
        worker_of(url) as stage,
        aiohttp.ClientSession() as client,
    ):
        answers: list[tuple[int, str | None]] = []

        async def ask() -> tuple[int, str | None]:
            async with client.get(f"{stage.url}/ready") as answer:
                answers.append((answer.status, (await answer.json())["reason"]))
            return answers[-1]

        assert await ask() == (200, None)
        assert channels[0].peer.kv == LAYOUT  # type: ignore[union-attr]
        other[0] = changed({"block_size": 32, "block_nbytes": 8192})
        await channels[0].close()
        await until(lambda: stage._refused is not None)
        status, reason = await ask()
        assert status == 503 and reason is not None
        assert reason.startswith(f"not registered with router {url}")
        assert "block_size 16, block_nbytes 4096" in reason
        assert "prefill-0 (block_size 32, block_nbytes 8192)" in reason
        other[0] = LAYOUT
        await until(lambda: len(channels) == 2 and stage.router is not None)
        assert await ask() == (200, None)
        await channels[1].close()
