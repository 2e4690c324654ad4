"""One encoder process under measurement, with the two ends it talks to: a router's, a consumer's.

The consumer claims embeddings and gives them back without reading them: what is measured ends
when the encoder says that they can be read.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from triptych import __version__, wire
from triptych.config import EncoderConfig, Secrets, Timeouts
from triptych.credentials import environment_of_children
from triptych.errors import TriptychError
from triptych.options import command_line
from triptych.request import Span
from triptych.stage.http import HttpServer, bind, url_of
from triptych.transfer.channel import Channel, Sessions
from triptych.transfer.handshake import Listener, dial

START_S = 300.0
WAIT_S = 120.0
KEEP_ALIVE_S = 2.0
"""Less than the encoder's: a connection that it is about to close is not used."""
TIMEOUTS = Timeouts()


@dataclass
class Encoder:
    """A running encoder process."""

    url: str
    router: Channel
    """Over which it is registered."""
    client: aiohttp.ClientSession
    spans: list[Span]
    """Of every image encoded since this was last emptied."""
    consumer: Channel | None = None
    _waiting: dict[int, asyncio.Future[None]] = field(default_factory=dict)
    _numbers: count[int] = field(default_factory=count)

    async def encode(
        self, request_id: str, files: Sequence[bytes], *, send: bool = True
    ) -> tuple[wire.EncodedItem, ...]:
        """``POST /encode``, with the bytes or (``send=False``) with digests alone."""
        items = tuple(
            wire.EncodeItem(index, hashlib.sha256(file).hexdigest(), file if send else None)
            for index, file in enumerate(files)
        )
        message = wire.EncodeRequest(request_id, items, images_in_request=len(files))
        headers = {
            wire.SESSION_HEADER: self.router.session,
            wire.TOKEN_HEADER: self.router.token,
        }
        async with self.client.post(
            f"{self.url}/encode", data=wire.encode(message), headers=headers
        ) as answer:
            body = await answer.read()
            if answer.status != 200:
                raise TriptychError(f"/encode answered {answer.status}: {body!r}")
            return wire.decode(body, wire.EncodeResponse).items

    async def ready(self, request_id: str, items: Sequence[wire.EncodedItem]) -> None:
        """Claim every item, wait until all can be read, and give them back."""
        assert self.consumer is not None
        claims = [next(self._numbers) for _ in items]
        loop = asyncio.get_running_loop()
        for claim, item in zip(claims, items, strict=True):
            if item.ref is None:
                raise TriptychError(f"image {item.index}: {item.error or 'missed'} {item.reason}")
            self._waiting[claim] = loop.create_future()
            self.consumer.send(wire.Claim(claim, item.ref, request_id))
        async with asyncio.timeout(WAIT_S):
            for claim in claims:
                await self._waiting[claim]
                del self._waiting[claim]
                self.consumer.send(wire.Release(claim))

    async def request(self, files: Sequence[bytes], *, send: bool = True) -> float:
        """Seconds from the request to its last embedding being ready."""
        began = time.perf_counter()
        request_id = f"request-{next(self._numbers)}"
        await self.ready(request_id, await self.encode(request_id, files, send=send))
        return time.perf_counter() - began

    async def get(self, path: str) -> tuple[float, str]:
        """Seconds and body of one GET."""
        began = time.perf_counter()
        async with self.client.get(self.url + path) as answer:
            text = await answer.text()
        return time.perf_counter() - began, text

    async def buckets(self, name: str, **labels: str) -> dict[float, float]:
        """Cumulative counts of a histogram by upper bound."""
        _, text = await self.get("/metrics")
        return {
            float(sample.labels["le"]): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"{name}_bucket"
            and labels.items() <= {k: v for k, v in sample.labels.items() if k != "le"}.items()
        }

    def durations(self, name: str) -> list[float]:
        """Seconds of every span of this name."""
        return [span.end - span.start for span in self.spans if span.name == name]

    def heard(self, channel: Channel, message: wire.ChannelMessage) -> None:
        """From the encoder, to either end."""
        match message:
            case wire.Spans():
                self.spans.extend(message.spans)
            case wire.Ready() if message.last:
                if (future := self._waiting.get(message.claim)) and not future.done():
                    future.set_result(None)
            case wire.Denied():
                if (future := self._waiting.get(message.claim)) and not future.done():
                    future.set_exception(TriptychError(f"{message.error}: {message.reason}"))


def hello(channel: Channel) -> wire.Hello:
    """What a prefill worker of the same model would say to the encoder."""
    identity = channel.peer.identity
    return wire.Hello(
        version=wire.VERSION,
        release=__version__,
        role="prefill",
        worker_id="prefill-0",
        url="http://127.0.0.1:1",
        nonce="",
        process="benchmark",
        identity=wire.ModelIdentity(identity.name, identity.fingerprint, identity.dtype, ""),
        capacity=wire.Capacity(),
        proof="",
    )


@asynccontextmanager
async def running(config: EncoderConfig, secrets: Secrets, log: Path) -> AsyncIterator[Encoder]:
    """Start ``triptych encoder`` with ``config`` and wait until it is registered here."""
    registered: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
    heard: defaultdict[str, list[Encoder]] = defaultdict(list)

    def on_message(channel: Channel, message: wire.ChannelMessage) -> None:
        for encoder in heard["encoder"]:
            encoder.heard(channel, message)

    listener = Listener(
        secret=secrets.shared,
        timeouts=TIMEOUTS,
        sessions=Sessions(),
        welcome=lambda: wire.Welcome("", "router", "router-0", "benchmark", ""),
        check=lambda hello: None,
        on_open=registered.set_result,
        on_message=on_message,
        on_lost=lambda channel, reason: None,
    )
    socket = bind("127.0.0.1", 0)
    app = Starlette(routes=[WebSocketRoute("/channel", listener.accept)])
    server = HttpServer(app, socket, drain_s=1.0)
    serving = asyncio.create_task(server.run_until_stopped())
    config = replace(config, network=replace(config.network, router=url_of(socket)))
    with log.open("wb") as file:
        process = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs yet
            [sys.executable, "-m", "triptych", "encoder", *command_line(config)],
            env=environment_of_children(secrets),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        channel = await _registered(registered, process, log)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=WAIT_S),
        ) as client:
            encoder = Encoder(channel.peer.url, channel, client, [])
            heard["encoder"].append(encoder)
            encoder.consumer = await dial(
                encoder.url,
                lambda: hello(channel),
                secrets.shared,
                TIMEOUTS,
                None,
                encoder.heard,
                lambda channel, reason: None,
            )
            yield encoder
            await encoder.consumer.close()
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(process.wait, TIMEOUTS.drain)
        process.kill()
        server.stop()
        await serving


async def _registered(
    registered: asyncio.Future[Channel], process: subprocess.Popen[bytes], log: Path
) -> Channel:
    async with asyncio.timeout(START_S):
        while not registered.done():
            if process.poll() is not None:
                raise TriptychError(f"the encoder ended:\n{log_tail(log)}")
            await asyncio.sleep(0.1)
    return registered.result()


def log_tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-4000:]


def secrets() -> Secrets:
    return Secrets(shared=os.urandom(32).hex().encode())
