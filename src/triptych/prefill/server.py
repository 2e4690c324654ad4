"""The prefill worker: embeddings in, KV and the first token out.

The life of a request here: ``prefill`` opens a KV slot and hands the prompt to the engine; the
feed brings the embeddings; each step's finished blocks become readable for decode; with the last
of them go the first token and the position that decode goes on from. When decode has released
the slot, or everybody has lost interest, the blocks are free again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from triptych import wire
from triptych.config import PrefillConfig, Secrets
from triptych.engine.messages import AddRequest, Cancel, Prefilled, Progress, StepOutput
from triptych.engine.sequence import ItemSpan
from triptych.errors import TriptychError
from triptych.stage.host import EngineHost, Loaded, create_language_stage
from triptych.stage.shell import Stage
from triptych.states import SlotState
from triptych.transfer.channel import Channel
from triptych.transfer.producer import Producer
from triptych.transfer.transports.http import transfer_route

logger = logging.getLogger(__name__)


@dataclass
class _Slot:
    """One request's KV, lent to decode."""

    number: int
    sent: int = 0
    """Blocks that have been made readable."""


class PrefillService:
    def __init__(self, loaded: Loaded, config: PrefillConfig) -> None:
        stage = self._stage = loaded.stage
        self.producer = Producer(stage.url, stage.nonce, stage.timeouts, self._on_idle)
        self.host = EngineHost(
            loaded,
            config.engine,
            moves_kv=True,
            transport=config.network.transport,
            landing_mib=config.landing.landing_mib,
            on_output=self._on_output,
            on_failed=self._on_failed,
        )
        self._slots: dict[str, _Slot] = {}
        self._requests: dict[int, str] = {}
        """Request of each slot."""

    async def start(self) -> None:
        await self.host.start()

    async def stop(self) -> None:
        self.producer.close()
        await self.host.stop()

    def offers(self) -> tuple[wire.TransportOffer, ...]:
        return self.host.offers()

    # ------------------------------------------------------------------ router and decode

    async def prefill(self, message: wire.PrefillRequest, channel: Channel) -> wire.PrefillResponse:
        """``POST /prefill``: answers at once; tokens and failures come on the channel."""
        request_id = message.request_id
        self.host.feed.check(message.items)
        kv = self.host.engine.kv
        ref = self.producer.lend_kv(
            len(message.token_ids) + len(message.resumed),
            kv.block_size,
            kv.block_nbytes,
            holder=channel.session,
            request_id=request_id,
        )
        self._slots[request_id] = _Slot(ref.slot)
        self._requests[ref.slot] = request_id
        self.host.engine.submit(
            AddRequest(
                request_id=request_id,
                token_ids=message.token_ids,
                items=tuple(ItemSpan.of(item.meta) for item in message.items),
                sampling=message.sampling,
                keep_kv=True,
                resumed=message.resumed,
            )
        )
        self.host.feed.start(request_id, message.items)
        return wire.PrefillResponse(kv=ref)

    def on_message(self, channel: Channel, message: wire.ChannelMessage) -> None:
        self.producer.handle(channel, message)

    def on_lost(self, channel: Channel) -> None:
        self.producer.session_lost(channel.session)

    def busy(self) -> bool:
        return bool(self._slots)

    def cancel(self, request_id: str) -> None:
        """The router has lost interest; a decode worker that has claimed the slot keeps it."""
        self.producer.cancel(request_id)

    # ------------------------------------------------------------------ engine

    def _on_output(self, output: StepOutput) -> None:
        done = {prefilled.request_id: prefilled for prefilled in output.prefilled}
        latest = {progress.request_id: progress for progress in output.progress}
        for progress in latest.values():
            self._lend_blocks(progress, done.get(progress.request_id))

    def _lend_blocks(self, progress: Progress, prefilled: Prefilled | None) -> None:
        slot = self._slots.get(progress.request_id)
        if slot is None or self.producer.state(slot.number) is not SlotState.FILLING:
            return
        kv = self.host.engine.kv
        pieces = [
            wire.Piece(self.host.kv_offset + kv.offset(block), kv.block_nbytes)
            for block in progress.blocks[slot.sent :]
        ]
        slot.sent = len(progress.blocks)
        if prefilled is None:
            if pieces:
                self.producer.ready(slot.number, pieces, last=False)
            return
        note = wire.encode(
            wire.PrefillDone(first=prefilled.first, next_position=prefilled.next_position)
        )
        self.producer.ready(slot.number, pieces, last=True, note=note)

    def _on_failed(self, request_id: str, error: TriptychError) -> None:
        slot = self._slots.get(request_id)
        if slot is not None and self.producer.state(slot.number) is SlotState.FILLING:
            self.producer.fail(slot.number, error)

    def _on_idle(self, number: int) -> None:
        """Nobody holds a lease on the slot any more: stop what still runs, free the blocks."""
        request_id = self._requests.pop(number, None)
        if request_id is not None:
            del self._slots[request_id]
            self.host.feed.end(request_id)
            self.host.engine.submit(Cancel(request_id))
        self.producer.close_slot(number)


def create(config: PrefillConfig, secrets: Secrets) -> Stage:
    """Load the language half, check the engine on it, and wire the worker. Blocks for seconds."""
    loaded = create_language_stage(
        "prefill", config.model, config.engine, config.network, config.timeouts, secrets
    )
    service = PrefillService(loaded, config)
    stage = loaded.stage
    stage.post("/prefill", wire.PrefillRequest, service.prefill)
    host = service.host
    may_read, others = service.producer.may_read, host.other_pools()
    stage.route(transfer_route(host.region, stage.sessions, may_read, others))
    stage.attach(service, host.capacity, host.layout, transports=host.transports)
    return stage
