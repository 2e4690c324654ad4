"""The encoder's service on a small model, with everything real around it but sockets."""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from triptych import wire
from triptych.config import EncoderConfig, ModelConfig
from triptych.encoder.service import EncoderService
from triptych.errors import TriptychError
from triptych.media.processor import Processor
from triptych.models.loading import identity, load_encoder
from triptych.models.vision import VisionModel
from triptych.refs import EmbeddingRef
from triptych.request import Detail, Kind, Span
from triptych.transfer.producer import Producer
from triptych.transfer.region import Region

ROUTER = "router-session"
WAIT_S = 10.0


def picture(seed: int, width: int = 96, height: int = 64) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def request(
    name: str,
    files: list[bytes],
    *,
    data: bool = True,
    kind: Kind = "image",
    wait: bool = True,
    detail: Detail = "high",
) -> wire.EncodeRequest:
    items = tuple(
        wire.EncodeItem(
            index, hashlib.sha256(file).hexdigest(), file if data else None, kind, detail
        )
        for index, file in enumerate(files)
    )
    return wire.EncodeRequest(
        name, items, images_in_request=len(files) * (kind == "image"), wait=wait
    )


class Gate:
    """A vision model whose forwards wait until they may go, and are counted."""

    def __init__(self, model: VisionModel) -> None:
        self.model = model
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()
        self.batches: list[int] = []
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def encode(self, batch: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        self.batches.append(len(batch))
        self.entered.set()
        assert self.open.wait(WAIT_S)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return self.model.encode(batch)


class Consumer:
    """A channel's far end that claims refs by hand; stands in for a prefill worker."""

    session = "consumer-session"

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.claims: dict[int, EmbeddingRef] = {}
        self.ready: dict[int, wire.Ready] = {}
        self.denied: dict[int, wire.Denied] = {}

    def send(self, message: wire.Message) -> None:
        if isinstance(message, wire.Ready):
            self.ready[message.claim] = message
        elif isinstance(message, wire.Denied):
            self.denied[message.claim] = message

    def say(self, message: wire.ChannelMessage) -> None:
        self.bench.service.producer.handle(self, message)  # type: ignore[arg-type]

    def claim(self, ref: EmbeddingRef, request_id: str) -> int:
        number = len(self.claims)
        self.claims[number] = ref
        self.say(wire.Claim(number, ref, request_id))
        return number

    async def read(self, number: int) -> torch.Tensor:
        """Wait for a claim to be ready, read what it points at and release it."""
        await until(lambda: number in self.ready or number in self.denied)
        assert number not in self.denied, self.denied
        (piece,) = self.ready[number].pieces
        ref = self.claims[number]
        assert self.ready[number].last and piece.nbytes == ref.nbytes
        rows = self.bench.region.tensor(piece.offset, ref.shape, getattr(torch, ref.dtype)).clone()
        self.say(wire.Release(number))
        return rows


class Bench:
    """The service with everything real around it but sockets."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        torch.set_num_threads(1)
        model = ModelConfig(str(folder))
        config = replace(EncoderConfig(model, pool_mib=1, threads=1), **changes)
        self.processor = Processor(model)
        self.gate = Gate(load_encoder(model))
        self.region = Region(config.pool_mib << 20, "nonce")
        self.reports: list[wire.Message] = []
        self.ended: TriptychError | None = None
        self.told: dict[str, list[Span]] = {}
        self.service = EncoderService(
            config,
            identity(model, self.processor.backend),
            self.processor,
            self.gate,  # type: ignore[arg-type]
            self.region,
            producer=lambda on_idle: Producer("http://encoder", "nonce", config.timeouts, on_idle),
            worker=self,
        )
        self.consumer = Consumer(self)

    def report(self, message: wire.Message) -> None:
        self.reports.append(message)

    def spans(self, request_id: str, spans: Sequence[Span]) -> None:
        self.told.setdefault(request_id, []).extend(spans)

    def fail(self, error: TriptychError) -> None:
        self.ended = error

    async def encode(self, message: wire.EncodeRequest) -> tuple[wire.EncodedItem, ...]:
        """As over the wire."""
        message = wire.decode(wire.encode(message), wire.EncodeRequest)
        answer = await self.service.encode(message, ROUTER)
        return wire.decode(wire.encode(answer), wire.EncodeResponse).items

    async def embeddings(
        self, name: str, files: list[bytes], kind: Kind = "image"
    ) -> list[torch.Tensor]:
        answers = await self.encode(request(name, files, kind=kind))
        claims = [self.consumer.claim(answer.ref, name) for answer in answers if answer.ref]
        assert len(claims) == len(files), answers
        return [await self.consumer.read(number) for number in claims]

    @property
    def nothing_is_leased(self) -> bool:
        slots = self.service._embeddings
        return all(self.service.producer.leases(slot) == 0 for slot in slots)

    async def settled(self) -> None:
        """No lease, no work, and every byte of the pool is free or can be evicted."""
        await until(lambda: not self.service._running and self.nothing_is_leased)
        while self.service.pool.free_nbytes < self.service.pool.nbytes:
            assert self.service._relieve(1), "a slot has leaked"
        assert not self.service._embeddings and not self.service._scheduler._work


@asynccontextmanager
async def bench(folder: Path, **changes: Any) -> AsyncIterator[Bench]:
    found = Bench(folder, **changes)
    await found.service.start()
    try:
        yield found
        found.gate.open.set()
        await found.settled()
    finally:
        found.gate.open.set()
        await found.service.stop()


async def until(condition: Any) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - conditions of several threads
            await asyncio.sleep(0.002)
