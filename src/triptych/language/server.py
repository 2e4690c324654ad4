"""The language worker: prefill and decode in one engine, without a KV hand-off."""

from __future__ import annotations

from triptych import wire
from triptych.config import LanguageConfig, Secrets
from triptych.engine.messages import AddRequest, Cancel, StepOutput
from triptych.engine.sequence import ItemSpan
from triptych.errors import TriptychError
from triptych.stage.host import EngineHost, Loaded, create_language_stage
from triptych.stage.shell import Stage
from triptych.transfer.channel import Channel


class LanguageService:
    def __init__(self, loaded: Loaded, config: LanguageConfig) -> None:
        self._held: dict[str, str] = {}
        """Router session of each running request."""
        self.host = EngineHost(
            loaded,
            config.engine,
            moves_kv=False,
            transport=config.network.transport,
            landing_mib=config.landing.landing_mib,
            on_output=self._on_output,
            on_failed=self._on_failed,
        )

    async def start(self) -> None:
        await self.host.start()

    async def stop(self) -> None:
        await self.host.stop()

    def offers(self) -> tuple[wire.TransportOffer, ...]:
        return ()

    async def generate(self, message: wire.PrefillRequest, channel: Channel) -> wire.Accepted:
        """``POST /generate``: answers at once; tokens and failures come on the channel."""
        self.host.feed.check(message.items)
        self._held[message.request_id] = channel.session
        self.host.engine.submit(
            AddRequest(
                request_id=message.request_id,
                token_ids=message.token_ids,
                items=tuple(ItemSpan.of(item.meta) for item in message.items),
                sampling=message.sampling,
                keep_kv=False,
                resumed=message.resumed,
            )
        )
        self.host.feed.start(message.request_id, message.items)
        return wire.Accepted()

    def on_message(self, channel: Channel, message: wire.ChannelMessage) -> None:
        """Nobody reads from this worker."""

    def on_lost(self, channel: Channel) -> None:
        for request_id in [r for r, session in self._held.items() if session == channel.session]:
            self.cancel(request_id)

    def busy(self) -> bool:
        return bool(self._held)

    def cancel(self, request_id: str) -> None:
        if self._held.pop(request_id, None) is not None:
            self.host.feed.end(request_id)
            self.host.engine.submit(Cancel(request_id))

    def _on_output(self, output: StepOutput) -> None:
        for event in output.tokens:
            if event.finish:
                self._held.pop(event.request_id, None)

    def _on_failed(self, request_id: str, error: TriptychError) -> None:
        self.cancel(request_id)


def create(config: LanguageConfig, secrets: Secrets) -> Stage:
    """Load the language half, check the engine on it, and wire the worker. Blocks for seconds."""
    loaded = create_language_stage(
        "language", config.model, config.engine, config.network, config.timeouts, secrets
    )
    service = LanguageService(loaded, config)
    stage = loaded.stage
    stage.post("/generate", wire.PrefillRequest, service.generate)
    stage.attach(service, service.host.capacity, transports=service.host.transports)
    return stage
