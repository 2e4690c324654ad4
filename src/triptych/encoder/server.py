"""The encoder worker: images and videos in, embeddings in a pool that consumers read.

``service.py`` tells the life of an image; this file joins it to the worker's shell.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from triptych import wire
from triptych.config import MIB, EncoderConfig, Secrets
from triptych.encoder.runner import self_check
from triptych.encoder.service import EncoderService
from triptych.errors import ConfigError
from triptych.media.processor import Processor
from triptych.models.captured import CudaGraphs
from triptych.models.loading import identity, load_encoder
from triptych.models.vision import VisionModel
from triptych.stage import Stage
from triptych.stage.http import Turns
from triptych.transfer.channel import Channel
from triptych.transfer.device_region import open_region
from triptych.transfer.producer import Producer
from triptych.transfer.transports.choice import open_transports
from triptych.transfer.transports.http import transfer_route


class EncoderWorker:
    """What the shell calls: the service, its region, and the transports that serve it."""

    def __init__(
        self, stage: Stage, config: EncoderConfig, processor: Processor, model: VisionModel
    ) -> None:
        self.region = open_region(config.pool_mib * MIB, stage.nonce, model.device)
        self.transports = open_transports(
            config.network.transport,
            self.region,
            url=stage.url,
            host=urlsplit(stage.url).hostname or config.network.host,
        )
        self._turns = Turns()
        self.service = EncoderService(
            config,
            stage.identity,
            processor,
            model,
            self.region,
            producer=lambda on_idle: Producer(stage.url, stage.nonce, stage.timeouts, on_idle),
            worker=stage,
        )

    async def start(self) -> None:
        await self.service.start()

    async def stop(self) -> None:
        await self.service.stop()
        for transport in self.transports.values():
            transport.close()
        self.region.close()

    def offers(self) -> tuple[wire.TransportOffer, ...]:
        return tuple(transport.offer() for transport in self.transports.values())

    async def encode(self, message: wire.EncodeRequest, channel: Channel) -> wire.EncodeResponse:
        await self._turns.take()
        return await self.service.encode(message, channel.session)

    def on_message(self, channel: Channel, message: wire.ChannelMessage) -> None:
        self.service.producer.handle(channel, message)

    def on_lost(self, channel: Channel) -> None:
        self.service.producer.session_lost(channel.session)

    def busy(self) -> bool:
        return self.service.producer.n_leases > 0

    def cancel(self, request_id: str) -> None:
        self.service.cancel(request_id)


def create(config: EncoderConfig, secrets: Secrets) -> Stage:
    """Load the vision half, check it against its processor, and wire the worker.

    Blocks for seconds. Raises ConfigError and UnsupportedModel.
    """
    for name in ("pool_mib", "batch_patches", "queue_patches"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} must be at least 1")
    if config.media_threads < 0:
        raise ConfigError("media_threads must be at least 1, or 0 for what suits the machine")
    processor = Processor(config.model)
    stage = Stage(
        "encoder",
        network=config.network,
        timeouts=config.timeouts,
        secrets=secrets,
        identity=identity(config.model, processor.backend),
    )
    model = load_encoder(config.model)
    self_check(model, processor)
    if config.model.compile and model.device.type != "cpu":
        model.compile(config.model.compile_cache)
        if model.can_be_captured:
            model.capture(CudaGraphs(model.device))
    worker = EncoderWorker(stage, config, processor, model)
    stage.post("/encode", wire.EncodeRequest, worker.encode)
    stage.route(transfer_route(worker.region, stage.sessions, worker.service.producer.may_read))
    capacity = wire.Capacity(pool_nbytes=worker.service.pool.nbytes)
    stage.attach(worker, capacity, transports=worker.transports)
    return stage
