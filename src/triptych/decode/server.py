"""The decode worker: KV in, tokens out.

The life of a request here: ``reserve`` takes blocks for prompt and answer; ``decode`` claims the
KV at the prefill worker and reads it chunk by chunk into those blocks while prefill still runs;
the last chunk brings the first token, and the engine goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from triptych import wire
from triptych.config import DecodeConfig, Secrets
from triptych.engine.messages import Cancel, Reserve, StartDecode, StepOutput
from triptych.errors import Cancelled, Overloaded, TransferFailed, TriptychError
from triptych.request import Span
from triptych.stage.host import EngineHost, Loaded, create_language_stage
from triptych.stage.shell import Stage
from triptych.transfer.channel import Channel

logger = logging.getLogger(__name__)


@dataclass
class _Reserved:
    """One request's blocks on this worker, from ``/reserve`` to the end of its answer."""

    holder: str
    """Session of the router that asked."""
    blocks: asyncio.Future[tuple[int, ...]]
    reading: asyncio.Task[None] | None = None
    """The pull of its KV."""


class DecodeService:
    def __init__(self, loaded: Loaded, config: DecodeConfig) -> None:
        self._stage = loaded.stage
        self._requests: dict[str, _Reserved] = {}
        self.host = EngineHost(
            loaded,
            config.engine,
            moves_kv=True,
            transport=config.network.transport,
            landing_mib=0,
            on_output=self._on_output,
            on_failed=self._on_failed,
        )

    async def start(self) -> None:
        await self.host.start()

    async def stop(self) -> None:
        for request_id in list(self._requests):
            self.cancel(request_id)
        await self.host.stop()

    def offers(self) -> tuple[wire.TransportOffer, ...]:
        return ()

    # ------------------------------------------------------------------ router

    async def reserve(self, message: wire.ReserveRequest, channel: Channel) -> wire.ReserveResponse:
        """``POST /reserve``: waits its turn for blocks; 429 when that takes too long.

        The reservation is the router channel's: lost channel, lost reservation.
        """
        request_id = message.request_id
        reserved = _Reserved(channel.session, asyncio.get_running_loop().create_future())
        self._requests[request_id] = reserved
        self.host.engine.submit(Reserve(request_id, message.n_tokens))
        try:
            async with asyncio.timeout(self._stage.timeouts.pool):
                blocks = await asyncio.shield(reserved.blocks)
        except TimeoutError:
            self.cancel(request_id)
            raise Overloaded(
                f"no room for {message.n_tokens} tokens within {self._stage.timeouts.pool:g} s"
            ) from None
        except (TriptychError, asyncio.CancelledError):
            self.cancel(request_id)
            raise
        return wire.ReserveResponse(n_blocks=len(blocks))

    async def decode(self, message: wire.DecodeRequest, channel: Channel) -> wire.Accepted:
        """``POST /decode``: answers at once; tokens and failures come on the channel."""
        reserved = self._requests.get(message.request_id)
        if reserved is None or not reserved.blocks.done():
            raise Cancelled(f"request {message.request_id} holds no reservation here")
        reading = asyncio.create_task(self._read(message, reserved.blocks.result()))
        reading.add_done_callback(partial(self._read_ended, message.request_id))
        reserved.reading = reading
        return wire.Accepted()

    def on_message(self, channel: Channel, message: wire.ChannelMessage) -> None:
        """Nobody reads from this worker."""

    def on_lost(self, channel: Channel) -> None:
        lost = [r for r, held in self._requests.items() if held.holder == channel.session]
        for request_id in lost:
            self.cancel(request_id)

    def busy(self) -> bool:
        return bool(self._requests)

    def cancel(self, request_id: str) -> None:
        """Free the request's blocks, but not before a read that was under way has ended."""
        reserved = self._requests.pop(request_id, None)
        if reserved is None:
            return
        if not reserved.blocks.done():
            reserved.blocks.set_exception(Cancelled(f"request {request_id} was cancelled"))
            reserved.blocks.exception()  # nobody may be waiting for it any more
        if reserved.reading is not None and not reserved.reading.done():
            reserved.reading.cancel()  # its end frees the blocks
        else:
            self.host.engine.submit(Cancel(request_id))

    # ------------------------------------------------------------------ KV

    async def _read(self, message: wire.DecodeRequest, blocks: tuple[int, ...]) -> None:
        """Bring the KV over, block by block, then let the engine go on from the first token."""
        request_id = message.request_id
        engine = self.host.engine
        asked = time.time()
        note = b""
        chunks = 0

        def place(first: int, pieces: Sequence[wire.Piece]) -> Sequence[int]:
            if first + len(pieces) > len(blocks):
                raise TransferFailed(f"prefill sends more than the {len(blocks)} blocks reserved")
            return [
                self.host.kv_offset + engine.kv.offset(blocks[first + i])
                for i in range(len(pieces))
            ]

        def landed(first: int, count: int, ready: wire.Ready) -> None:
            nonlocal note, chunks
            note, chunks = ready.note, chunks + 1

        try:
            pulled = await self.host.consumer.pull(
                message.kv, request_id, place, landed, self._stage.timeouts.kv
            )
            done = wire.decode(note, wire.PrefillDone)
        except TriptychError as exc:
            wait = exc.quarantine_s if isinstance(exc, TransferFailed) else 0.0
            self._requests.pop(request_id, None)
            self._free_later(request_id, wait)
            self.host.report_failed(request_id, exc)
            return
        now = time.time()
        span = Span(
            name="kv_read",
            start=asked,
            end=now,
            nbytes=pulled.nbytes * self.host.layout.tp_size,
            transport=pulled.transport,
            note=f"{chunks} chunks, {pulled.read_s * 1000:.1f} ms reading",
        )
        self._stage.spans(request_id, [span])
        engine.submit(
            StartDecode(
                request_id=request_id,
                n_prompt=message.kv.n_tokens,
                first=done.first,
                next_position=done.next_position,
                sampling=message.sampling,
                resumed=message.resumed,
            )
        )
        if done.first.finish:
            self._requests.pop(request_id, None)

    def _read_ended(self, request_id: str, reading: asyncio.Task[None]) -> None:
        if reading.cancelled():  # a cancelled pull ends when nothing can be written any more
            self.host.engine.submit(Cancel(request_id))

    def _free_later(self, request_id: str, seconds: float) -> None:
        """Blocks that a transfer may still write go back when it can no longer."""
        asyncio.get_running_loop().call_later(seconds, self.host.engine.submit, Cancel(request_id))

    # ------------------------------------------------------------------ engine

    def _on_output(self, output: StepOutput) -> None:
        for reserved in output.reserved:
            held = self._requests.get(reserved.request_id)
            if held is not None and not held.blocks.done():
                held.blocks.set_result(reserved.blocks)
        for event in output.tokens:
            if event.finish:
                self._requests.pop(event.request_id, None)

    def _on_failed(self, request_id: str, error: TriptychError) -> None:
        held = self._requests.pop(request_id, None)
        if held is not None and not held.blocks.done():
            held.blocks.set_exception(error)


def create(config: DecodeConfig, secrets: Secrets) -> Stage:
    """Load the language half, check the engine on it, and wire the worker. Blocks for seconds."""
    loaded = create_language_stage(
        "decode", config.model, config.engine, config.network, config.timeouts, secrets
    )
    service = DecodeService(loaded, config)
    stage = loaded.stage
    stage.post("/reserve", wire.ReserveRequest, service.reserve)
    stage.post("/decode", wire.DecodeRequest, service.decode)
    host = service.host
    stage.attach(service, host.capacity, host.layout, transports=host.transports)
    return stage
