"""The producer's book of slots, leases and claims. No I/O, no clock: ``now`` is passed in.

A *slot* is memory that is filled once and lent; it has a number that is never given out twice in
a process. A *lease* is a promise to one request to keep a slot's memory. It is held by a session:
first the router's, which asked for the slot; then that of the consumer whose claim takes it over.
It ends with release, cancel, denial, the loss of its session, or its holder's silence. While a
lease lives the memory stays as it is, so bytes that were read under it are right: that is what
``Validate`` asks. A consumer whose lease ended because it was held up (silence, a lost channel)
may claim again while the slot is there: it holds the same content. So may one that has released an
embedding, until its request is cancelled: what it computed from it may have to be computed again.

Messages to send collect in ``outbox``, slots whose last lease ended in ``idle``, what happened
in ``tally``.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from triptych import wire
from triptych.errors import SlotGone, TransferFailed, TriptychError, WorkerLost
from triptych.refs import AnyRef, EmbeddingRef, KVRef
from triptych.states import SLOT, SlotEvent, SlotState, advance

REMEMBERED_LAPSES = 4096
"""Requests whose claimed leases ended by silence or loss, or by the release of an embedding: those
of so many may be claimed again."""
REMEMBERED_SESSIONS = 1024
"""Ended sessions that are known to have ended: a request may outlive the channel it came by."""
EXPIRED = "expired"
"""In ``Lender.tally``: leases that ended by silence. Everything else there is a denied claim."""


@dataclass
class Slot:
    ref: AnyRef
    state: SlotState = SlotState.FILLING
    pieces: list[wire.Piece] = field(default_factory=list)
    """Readable, in the order of the ref's content."""
    note: bytes = b""
    error: TriptychError | None = None
    leases: set[Lease] = field(default_factory=set)
    readable: dict[int, int] = field(default_factory=dict)
    """nbytes of the piece at an offset."""


@dataclass(eq=False)
class Lease:
    slot: Slot
    request_id: str
    holder: str
    """Session id."""
    claim: int | None = None
    """The consumer's number, once claimed."""
    validated: int = 0
    """Pieces that the consumer was told were right."""


class Lender:
    """All leases of one producer process. ``lease_s``: a holder may be silent for this long."""

    def __init__(self, url: str, nonce: str, lease_s: float) -> None:
        self.outbox: list[tuple[str, wire.Message]] = []
        """(session id, message) to send, oldest first."""
        self.idle: list[int] = []
        """Slots whose last lease has ended since this was last emptied."""
        self.tally: Counter[str] = Counter()
        """Expired leases and denied claims by reason, since this was last emptied."""
        self.n_leases = 0
        self._url = url
        self._nonce = nonce
        self._lease_s = lease_s
        self._slots: dict[int, Slot] = {}
        self._next = 1
        self._by_holder: defaultdict[str, set[Lease]] = defaultdict(set)
        self._by_request: defaultdict[str, set[Lease]] = defaultdict(set)
        self._claims: dict[tuple[str, int], Lease] = {}
        self._heard: dict[str, float] = {}
        """When a session that holds leases was last heard of."""
        self._lapsed: OrderedDict[str, set[int]] = OrderedDict()
        """Request id → slots of which its claimed lease ended and may be had again."""
        self._gone: OrderedDict[str, None] = OrderedDict()
        """Sessions that have ended, the latest last."""

    # ------------------------------------------------------------------ the owner's side

    def lend_embedding(
        self,
        nbytes: int,
        key: str,
        dtype: str,
        shape: tuple[int, int, int],
        lease: tuple[str, str],
        now: float,
    ) -> EmbeddingRef:
        """Open a slot of one piece, with a ``lease`` (holder's session id, request id)."""
        make = partial(EmbeddingRef, nbytes=nbytes, key=key, dtype=dtype, shape=shape)
        ref = make(owner=self._url, nonce=self._nonce, slot=self._next, generation=self._next)
        self._open(ref, lease, now)
        return ref

    def lend_kv(
        self, n_tokens: int, block_size: int, block_nbytes: int, lease: tuple[str, str], now: float
    ) -> KVRef:
        """Open a slot of one piece per block."""
        ref = KVRef(
            owner=self._url,
            nonce=self._nonce,
            slot=self._next,
            generation=self._next,
            nbytes=-(-n_tokens // block_size) * block_nbytes,
            n_tokens=n_tokens,
            block_size=block_size,
            block_nbytes=block_nbytes,
        )
        self._open(ref, lease, now)
        return ref

    def lend_again(self, slot: int, lease: tuple[str, str], now: float) -> AnyRef:
        """Another lease on an open slot, whatever its state."""
        entry = self._slots[slot]
        self._lease(entry, lease, now)
        return entry.ref

    def ready(self, slot: int, pieces: Sequence[wire.Piece], *, last: bool, note: bytes) -> None:
        """More pieces can be read. Raises IllegalTransition unless the slot is being filled."""
        entry = self._slots[slot]
        first = len(entry.pieces)
        nbytes = sum(piece.nbytes for piece in (*entry.pieces, *pieces))
        assert nbytes == entry.ref.nbytes if last else nbytes <= entry.ref.nbytes
        entry.state = advance(SLOT, entry.state, SlotEvent.LAST if last else SlotEvent.PIECES)
        entry.pieces.extend(pieces)
        entry.readable.update((piece.offset, piece.nbytes) for piece in pieces)
        entry.note = note
        for lease in entry.leases:
            if lease.claim is not None:
                message = wire.Ready(lease.claim, first, tuple(pieces), last, note)
                self.outbox.append((lease.holder, message))

    def fail(self, slot: int, error: TriptychError) -> None:
        """The slot will never be complete: every claim is denied, those to come as well."""
        entry = self._slots[slot]
        entry.state = advance(SLOT, entry.state, SlotEvent.FAIL)
        entry.error = error
        for lease in [lease for lease in entry.leases if lease.claim is not None]:
            self._deny(lease.holder, lease.claim, error, "failed")
            self._drop(lease)

    def close_slot(self, slot: int) -> None:
        """Forget a slot without leases: its memory gets another use."""
        entry = self._slots[slot]
        assert not entry.leases, f"slot {slot} is leased"
        entry.state = advance(SLOT, entry.state, SlotEvent.CLOSE)
        del self._slots[slot]

    def state(self, slot: int) -> SlotState:
        entry = self._slots.get(slot)
        return SlotState.CLOSED if entry is None else entry.state

    def leases(self, slot: int) -> int:
        entry = self._slots.get(slot)
        return 0 if entry is None else len(entry.leases)

    # ------------------------------------------------------------------ what ends leases

    def cancel(self, request_id: str, error: TriptychError) -> None:
        """Drop the request's leases; a consumer that claimed one is told. Idempotent."""
        for lease in list(self._by_request.get(request_id, ())):
            if lease.claim is not None:
                self._deny(lease.holder, lease.claim, error, "cancelled")
            self._drop(lease)
        self._lapsed.pop(request_id, None)

    def session_lost(self, session: str) -> None:
        """Drop all leases of a session, for good. Idempotent."""
        self._gone[session] = None
        if len(self._gone) > REMEMBERED_SESSIONS:
            self._gone.popitem(last=False)
        for lease in list(self._by_holder.get(session, ())):
            self._lapse(lease)

    def heard(self, session: str, now: float) -> None:
        """A sign of life renews all leases of a session."""
        if session in self._heard:
            self._heard[session] = now

    def expire(self, now: float) -> None:
        """Drop the leases of holders that have been silent for too long, or had ended before they
        were lent to."""
        for session, heard in list(self._heard.items()):
            if now - heard <= self._lease_s and session not in self._gone:
                continue
            for lease in list(self._by_holder[session]):
                if lease.claim is not None:
                    self.outbox.append((session, wire.Expired(lease.claim)))
                self.tally[EXPIRED] += 1
                self._lapse(lease)

    # ------------------------------------------------------------------ the consumer's messages

    def claim(self, session: str, message: wire.Claim, now: float) -> None:
        """Take over the request's lease and tell what is ready, or deny."""
        if (session, message.claim) in self._claims:
            error = TransferFailed("the claim's number is in use")
            self._deny(session, message.claim, error, "number in use")
            return
        entry = self._find(message.ref)
        if not isinstance(entry, Slot):
            self._deny(session, message.claim, *entry)
            return
        lease = self._claimable(entry, message.request_id, session, now)
        if lease is None:
            reason = f"no lease of request {message.request_id}: expired, cancelled or claimed"
            self._deny(session, message.claim, SlotGone(reason), "no lease")
            return
        if entry.error is not None:
            self._deny(session, message.claim, entry.error, "failed")
            self._drop(lease)
            return
        self._move(lease, session, now)
        lease.claim = message.claim
        self._claims[session, message.claim] = lease
        if entry.pieces or entry.state is SlotState.READY:
            last = entry.state is SlotState.READY
            ready = wire.Ready(message.claim, 0, tuple(entry.pieces), last, entry.note)
            self.outbox.append((session, ready))

    def validate(self, session: str, message: wire.Validate) -> None:
        lease = self._claims.get((session, message.claim))
        end = message.first + message.count
        answer: wire.Message = wire.Expired(message.claim)
        if lease is not None and 0 <= message.first <= end <= len(lease.slot.pieces):
            lease.validated = max(lease.validated, end)
            answer = wire.Valid(message.claim, message.first, message.count)
        self.outbox.append((session, answer))

    def release(self, session: str, message: wire.Release) -> AnyRef | None:
        """Idempotent. The ref of a slot that the consumer has used to its end, else None."""
        lease = self._claims.get((session, message.claim))
        if lease is None:
            return None
        if isinstance(lease.slot.ref, EmbeddingRef):
            self._lapse(lease)
        else:
            self._drop(lease)
        slot = lease.slot
        had_all = slot.state is SlotState.READY and lease.validated == len(slot.pieces)
        return slot.ref if had_all else None

    def may_read(self, session: str, pieces: Iterable[tuple[int, int]]) -> bool:
        """Is every (offset, nbytes) a whole ready piece of a slot that the session has claimed?"""
        claimed = [x.slot for x in self._by_holder.get(session, ()) if x.claim is not None]
        return all(
            any(slot.readable.get(offset) == nbytes for slot in claimed)
            for offset, nbytes in pieces
        )

    # ------------------------------------------------------------------ inside

    def _open(self, ref: AnyRef, lease: tuple[str, str], now: float) -> None:
        self._next += 1
        entry = self._slots[ref.slot] = Slot(ref)
        self._lease(entry, lease, now)

    def _lease(self, entry: Slot, holder_and_request: tuple[str, str], now: float) -> Lease:
        holder, request_id = holder_and_request
        lease = Lease(entry, request_id, holder)
        entry.leases.add(lease)
        self.n_leases += 1
        self._by_request[request_id].add(lease)
        self._by_holder[holder].add(lease)
        self._heard[holder] = now
        return lease

    def _move(self, lease: Lease, session: str, now: float) -> None:
        self._unhold(lease)
        lease.holder = session
        self._by_holder[session].add(lease)
        self._heard[session] = now

    def _unhold(self, lease: Lease) -> None:
        held = self._by_holder[lease.holder]
        held.remove(lease)
        if not held:
            del self._by_holder[lease.holder], self._heard[lease.holder]

    def _drop(self, lease: Lease) -> None:
        self._unhold(lease)
        requested = self._by_request[lease.request_id]
        requested.remove(lease)
        if not requested:
            del self._by_request[lease.request_id]
        if lease.claim is not None:
            del self._claims[lease.holder, lease.claim]
        lease.slot.leases.remove(lease)
        self.n_leases -= 1
        if not lease.slot.leases:
            self.idle.append(lease.slot.ref.slot)

    def _find(self, ref: AnyRef) -> Slot | tuple[TriptychError, str]:
        """The slot that a ref from the network names, or why there is none, in long and short."""
        if ref.nonce != self._nonce:
            return WorkerLost("the ref is of a process that is gone"), "another process"
        entry = self._slots.get(ref.slot)
        if entry is None or entry.ref.generation != ref.generation:
            gone = f"slot {ref.slot} generation {ref.generation} has expired"
            return SlotGone(gone), "slot gone"
        if entry.ref != ref:
            return TransferFailed(f"the ref of slot {ref.slot} was altered"), "altered ref"
        return entry

    def _lapse(self, lease: Lease) -> None:
        """It ends, and may be had again if it was claimed."""
        if lease.claim is not None:
            self._lapsed.setdefault(lease.request_id, set()).add(lease.slot.ref.slot)
            if len(self._lapsed) > REMEMBERED_LAPSES:
                self._lapsed.popitem(last=False)
        self._drop(lease)

    def _claimable(self, entry: Slot, request_id: str, session: str, now: float) -> Lease | None:
        """The request's lease on the slot that nobody has claimed, or a new one in place of one
        that may be had again."""
        leases = self._by_request.get(request_id, ())
        lease = next((x for x in leases if x.slot is entry and x.claim is None), None)
        lapsed = self._lapsed.get(request_id, set())
        if lease is None and entry.ref.slot in lapsed:
            lapsed.remove(entry.ref.slot)
            if not lapsed:
                del self._lapsed[request_id]
            lease = self._lease(entry, (session, request_id), now)
        return lease

    def _deny(self, session: str, claim: int | None, error: TriptychError, reason: str) -> None:
        assert claim is not None
        self.tally[reason] += 1
        item = -1 if error.item is None else error.item
        denied = wire.Denied(claim, type(error).__name__, error.message, item)
        self.outbox.append((session, denied))
