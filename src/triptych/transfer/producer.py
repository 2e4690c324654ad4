"""The producer's side of the transfer plane, as a role's server uses it."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from weakref import WeakSet

from triptych import wire
from triptych.config import Timeouts
from triptych.errors import Cancelled, TriptychError
from triptych.observe import metrics
from triptych.refs import AnyRef, EmbeddingRef, KVRef
from triptych.states import SlotState
from triptych.transfer.channel import Channel
from triptych.transfer.session import EXPIRED, Lender

logger = logging.getLogger(__name__)
_producers: WeakSet[Producer] = WeakSet()
metrics.leases.set_function(lambda: sum(producer.n_leases for producer in _producers))


class Producer:
    """Lends slots of this process's memory to requests. Used from the event loop's thread.

    ``url``: base URL of this worker's server, which is in every ref. ``nonce``: of this process.
    ``on_idle(slot)``: the slot's last lease has ended; its owner may ``close_slot`` and reuse the
    memory, at once or later. Called from within the call that ended the lease, and by a timer.
    """

    def __init__(
        self, url: str, nonce: str, timeouts: Timeouts, on_idle: Callable[[int], None]
    ) -> None:
        self._lender = Lender(url, nonce, timeouts.lease)
        self._heartbeat = timeouts.heartbeat
        self._on_idle = on_idle
        self._channels: dict[str, Channel] = {}
        """Of consumers, by session id."""
        self._timer: asyncio.TimerHandle | None = None
        self._settling = False
        _producers.add(self)

    @property
    def n_leases(self) -> int:
        """Of all slots."""
        return self._lender.n_leases

    # ------------------------------------------------------------------ the owner's side

    def lend_embedding(
        self,
        piece: wire.Piece,
        key: str,
        dtype: str,
        shape: tuple[int, int, int],
        *,
        holder: str,
        request_id: str,
    ) -> EmbeddingRef:
        """Open a slot for an embedding that will be in ``piece``; nothing is readable yet.

        ``holder``: session id of the router's channel, which holds the lease until the consumer
        claims it.
        """
        now = self._now()
        return self._lender.lend_embedding(
            piece.nbytes, key, dtype, shape, (holder, request_id), now
        )

    def lend_kv(
        self, n_tokens: int, block_size: int, block_nbytes: int, *, holder: str, request_id: str
    ) -> KVRef:
        """Open a slot for the KV blocks of ``n_tokens``; nothing is readable yet."""
        lease = (holder, request_id)
        return self._lender.lend_kv(n_tokens, block_size, block_nbytes, lease, self._now())

    def lend_again(self, slot: int, *, holder: str, request_id: str) -> AnyRef:
        """Another lease on a slot that is open: the same content for another request (or again
        for the same one). Raises KeyError when the slot is closed."""
        return self._lender.lend_again(slot, (holder, request_id), self._now())

    def ready(
        self, slot: int, pieces: Sequence[wire.Piece], *, last: bool, note: bytes = b""
    ) -> None:
        """More pieces can be read, in the order of the ref's content. Call it once the host has
        seen the bytes complete. ``note`` goes out with the last pieces.

        KeyError when the slot is closed, IllegalTransition when it is complete or has failed: ask
        ``state`` first where a request may have ended meanwhile.
        """
        self._lender.ready(slot, pieces, last=last, note=note)
        self._settle()

    def fail(self, slot: int, error: TriptychError) -> None:
        """The slot will never be complete: every claim, also those to come, is denied with
        ``error``. KeyError and IllegalTransition as ``ready``."""
        self._lender.fail(slot, error)
        self._settle()

    def close_slot(self, slot: int) -> None:
        """Forget a slot that has no leases (asserted)."""
        self._lender.close_slot(slot)

    def state(self, slot: int) -> SlotState:
        """CLOSED also for a slot that never was."""
        return self._lender.state(slot)

    def leases(self, slot: int) -> int:
        return self._lender.leases(slot)

    # ------------------------------------------------------------------ what ends leases

    def cancel(self, request_id: str) -> None:
        """Drop all leases of a request; a consumer that holds one is told. Idempotent."""
        self._lender.cancel(request_id, Cancelled(f"request {request_id} was cancelled"))
        self._settle()

    def session_lost(self, session: str) -> None:
        """A channel has ended: drop all leases it held. Idempotent."""
        self._channels.pop(session, None)
        self._lender.session_lost(session)
        self._settle()

    def close(self) -> None:
        """Stop the timer. Leases are not touched: their channels are about to end."""
        if self._timer is not None:
            self._timer.cancel()

    # ------------------------------------------------------------------ messages

    def handle(self, channel: Channel, message: wire.ChannelMessage) -> bool:
        """Take a message from any channel; False when it is not for a producer.

        Pass every message of every channel, the router's included: heartbeats renew leases.
        """
        session, now = channel.session, self._now()
        self._lender.heard(session, now)
        match message:
            case wire.Ping() | wire.Pong():
                return True
            case wire.Claim():
                self._channels[session] = channel
                self._lender.claim(session, message, now)
            case wire.Validate():
                self._lender.validate(session, message)
            case wire.Release():
                ref = self._lender.release(session, message)
                if ref is not None:
                    kind = "embedding" if isinstance(ref, EmbeddingRef) else "kv"
                    metrics.lent.labels(kind).inc()
                    metrics.lent_bytes.labels(kind).inc(ref.nbytes)
            case _:
                return False
        self._settle()
        return True

    def may_read(self, session: str, pieces: Iterable[tuple[int, int]]) -> bool:
        """Is every (offset, nbytes) a whole ready piece of a slot that the session has claimed?"""
        return self._lender.may_read(session, pieces)

    # ------------------------------------------------------------------ inside

    def _now(self) -> float:
        """The time; leases need the timer from the first call on."""
        loop = asyncio.get_running_loop()
        if self._timer is None:
            self._timer = loop.call_later(self._heartbeat, self._tick)
        return loop.time()

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        assert self._timer is not None
        late_s = loop.time() - self._timer.when()
        self._timer = loop.call_later(self._heartbeat, self._tick)
        if late_s > self._heartbeat:
            # This process was held up, and what its peers sent meanwhile is read after this
            # call: they were not silent.
            logger.warning("the event loop was held up for %.1f s", late_s)
            return
        self._lender.expire(loop.time())
        self._settle()

    def _settle(self) -> None:
        """Send what the lender wants sent and report slots that became idle."""
        if self._settling:  # on_idle came back to us; the loop below goes on with what it added
            return
        self._settling = True
        try:
            while self._lender.outbox or self._lender.idle:
                outbox, self._lender.outbox = self._lender.outbox, []
                idle, self._lender.idle = self._lender.idle, []
                for session, message in outbox:
                    if (channel := self._channels.get(session)) is not None:
                        channel.send(message)
                for slot in idle:
                    if self.leases(slot) == 0 and self.state(slot) is not SlotState.CLOSED:
                        self._on_idle(slot)
        finally:
            self._settling = False
        tally, self._lender.tally = self._lender.tally, Counter()
        for what, count in tally.items():
            if what == EXPIRED:
                metrics.leases_expired.inc(count)
            else:
                metrics.claims_denied.labels(what).inc(count)
