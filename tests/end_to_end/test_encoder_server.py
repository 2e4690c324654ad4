"""The encoder worker over real sockets: registration, POST /encode, and a consumer that reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from starlette.routing import WebSocketRoute

from tests.end_to_end.encoder_bench import WAIT_S, bench, picture, png, request, until
from tests.transfer_rig import FAST, SECRET, bound, serving
from triptych import __version__, wire
from triptych.config import EncoderConfig, ModelConfig, NetworkConfig, Secrets
from triptych.demo.tiny import make_tiny_model
from triptych.encoder.server import create
from triptych.errors import ConfigError, PeerRefused
from triptych.stage import Stage
from triptych.transfer.channel import Channel, Sessions
from triptych.transfer.consumer import Consumer
from triptych.transfer.handshake import Listener, dial
from triptych.transfer.region import Region
from triptych.transfer.transports.choice import open_transports

SECRETS = Secrets(shared=SECRET)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("qwen3_vl"), "qwen3_vl")


@dataclass
class Router:
    """The far end of the worker's channel, and a client of its routes."""

    stage: Stage
    channel: Channel
    client: aiohttp.ClientSession
    messages: list[wire.Message]

    async def post(self, message: wire.EncodeRequest, **headers: str) -> tuple[int, bytes]:
        own = {
            wire.SESSION_HEADER: self.channel.session,
            wire.TOKEN_HEADER: self.channel.token,
            **headers,
        }
        async with self.client.post(
            f"{self.stage.url}/encode", data=wire.encode(message), headers=own
        ) as answer:
            return answer.status, await answer.read()

    async def encode(self, message: wire.EncodeRequest) -> tuple[wire.EncodedItem, ...]:
        status, body = await self.post(message)
        assert status == 200, body
        return wire.decode(body, wire.EncodeResponse).items


@asynccontextmanager
async def worker(folder: Path, **network: Any) -> AsyncIterator[Router]:
    torch.set_num_threads(1)
    listener_socket, url = bound()
    channels: list[Channel] = []
    messages: list[wire.Message] = []
    listener = Listener(
        secret=SECRET,
        timeouts=FAST,
        sessions=Sessions(),
        welcome=lambda: wire.Welcome("", "router", "router-0", "p", ""),
        check=lambda hello: None,
        on_open=channels.append,
        on_message=lambda channel, message: messages.append(message),
        on_lost=lambda channel, reason: None,
    )
    config = EncoderConfig(
        ModelConfig(str(folder)),
        NetworkConfig(router=url, **network),
        timeouts=replace(FAST, drain=0.2),  # this router never says that it is not needed
        pool_mib=1,
        threads=1,
    )
    stage = create(config, SECRETS)
    async with (
        serving([WebSocketRoute("/channel", listener.accept)], listener_socket),
        aiohttp.ClientSession() as client,
    ):
        running = asyncio.create_task(stage.serve(handle_signals=False))
        try:
            async with asyncio.timeout(WAIT_S):
                await stage.started.wait()
            await until(lambda: bool(channels))
            yield Router(stage, channels[0], client, messages)
        finally:
            stage.stop()
            await running


@asynccontextmanager
async def consumer(stage: Stage, transport: Any) -> AsyncIterator[tuple[Consumer, Region, int]]:
    """A prefill worker's consumer, with room for one embedding."""
    region = Region(1 << 19, "consumer")
    offset = region.carve(1 << 19)
    hello = wire.Hello(
        wire.VERSION, __version__, "prefill", "prefill-0", "http://127.0.0.1:1", "", "c",
        replace_processor(stage.identity), wire.Capacity(), "",
    )  # fmt: skip

    async def dialer(url: str, on_message: Any, on_lost: Any) -> Channel:
        return await dial(url, lambda: hello, SECRET, FAST, None, on_message, on_lost)

    transports = open_transports(transport, region, url="http://127.0.0.1:1", host="127.0.0.1")
    found = Consumer(dialer, region, transports, FAST)
    try:
        yield found, region, offset
    finally:
        await found.close()
        for each in transports.values():
            each.close()
        region.close()


def replace_processor(identity: wire.ModelIdentity) -> wire.ModelIdentity:
    """A language worker has no image processor."""
    return wire.ModelIdentity(identity.name, identity.fingerprint, identity.dtype, "")


@pytest.mark.parametrize("transport", ["shm", "http"])
async def test_embeddings_arrive_in_a_consumers_memory(folder: Path, transport: str) -> None:
    file = png(picture(1))
    async with bench(folder) as direct:
        (expected,) = await direct.embeddings("direct", [file])
    async with worker(folder) as router, consumer(router.stage, transport) as parts:
        pulling, region, offset = parts
        (item,) = await router.encode(request("r1", [file]))
        assert item.ref is not None
        pulled = await pulling.pull(
            item.ref,
            "r1",
            place=lambda first, pieces: [offset],
            landed=lambda first, count, ready: None,
            timeout_s=WAIT_S,
        )
        assert (pulled.transport, pulled.nbytes) == (transport, item.ref.nbytes)
        assert torch.equal(region.tensor(offset, item.ref.shape, torch.float32), expected)
        await until(lambda: any(isinstance(message, wire.Spans) for message in router.messages))
        (spans,) = (message for message in router.messages if isinstance(message, wire.Spans))
        assert spans.request_id == "r1"
        assert {(span.role, span.pid > 0) for span in spans.spans} == {("encoder", True)}


async def test_a_failure_at_decoding_reaches_router_and_consumer(folder: Path) -> None:
    async with worker(folder) as router, consumer(router.stage, "shm") as parts:
        (item,) = await router.encode(request("r1", [png(picture(9, 300, 300))[:5000]]))
        assert item.ref is not None
        with pytest.raises(Exception, match="corrupt or truncated"):
            await parts[0].pull(item.ref, "r1", lambda *_: [parts[2]], lambda *_: None, WAIT_S)
        await until(lambda: any(isinstance(message, wire.Failed) for message in router.messages))


async def test_strangers_and_wrong_bodies_are_refused(folder: Path) -> None:
    message = request("r1", [png(picture(1))])
    async with worker(folder) as router:
        status, body = await router.post(message, **{wire.TOKEN_HEADER: "0" * 64})
        assert (status, wire.decode(body, wire.Problem).error) == (502, PeerRefused.__name__)
        async with router.client.post(
            f"{router.stage.url}/encode",
            data=b"\x80",
            headers={
                wire.SESSION_HEADER: router.channel.session,
                wire.TOKEN_HEADER: router.channel.token,
            },
        ) as answer:
            assert answer.status == 400


async def test_cancel_on_the_channel_ends_the_work(folder: Path) -> None:
    async with worker(folder) as router:
        router.channel.send(wire.Cancel("r1"))
        await asyncio.sleep(0.05)
        status, body = await router.post(request("r1", [png(picture(1))]))
        assert (status, wire.decode(body, wire.Problem).error) == (499, "Cancelled")


def test_senseless_limits_are_refused(folder: Path) -> None:
    config = EncoderConfig(ModelConfig(str(folder)))
    with pytest.raises(ConfigError, match="media_threads"):
        create(replace(config, media_threads=-1), SECRETS)
