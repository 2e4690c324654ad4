"""The lender alone: no sockets, the clock is an argument."""

from __future__ import annotations

import random
from collections import Counter

import msgspec
import pytest

from triptych import wire
from triptych.errors import BadMedia, Cancelled, TriptychError
from triptych.refs import EmbeddingRef, KVRef
from triptych.states import IllegalTransition, SlotState
from triptych.transfer.session import EXPIRED, REMEMBERED_SESSIONS, Lender

LEASE_S = 60.0
PIECE = wire.Piece(8192, 48)


@pytest.fixture
def lender() -> Lender:
    return Lender("http://here:1", "nonce-a", LEASE_S)


def embedding(lender: Lender, request: str = "r1", now: float = 0.0) -> EmbeddingRef:
    return lender.lend_embedding(48, "key", "float32", (1, 3, 4), ("router", request), now)


def claim(
    lender: Lender,
    ref: EmbeddingRef | KVRef,
    number: int = 1,
    *,
    request: str = "r1",
    session: str = "consumer",
    now: float = 0.0,
) -> None:
    lender.claim(session, wire.Claim(number, ref, request), now)


def sent(lender: Lender) -> list[wire.Message]:
    messages = [message for _, message in lender.outbox]
    lender.outbox.clear()
    return messages


def only(lender: Lender) -> wire.Message:
    (message,) = sent(lender)
    return message


def denied(lender: Lender, kind: str, words: str) -> None:
    message = only(lender)
    assert isinstance(message, wire.Denied)
    assert message.error == kind
    assert words in message.reason


def test_ready_before_claim_and_claim_before_ready(lender: Lender) -> None:
    early, late = embedding(lender), embedding(lender, "r2")
    lender.ready(early.slot, [PIECE], last=True, note=b"n")
    assert sent(lender) == []
    claim(lender, early, 7)
    assert only(lender) == wire.Ready(7, 0, (PIECE,), True, b"n")
    claim(lender, late, 8, request="r2")
    assert sent(lender) == []
    lender.ready(late.slot, [PIECE], last=True, note=b"")
    assert lender.outbox == [("consumer", wire.Ready(8, 0, (PIECE,), True, b""))]


def test_kv_grows_and_a_late_claim_gets_all_of_it(lender: Lender) -> None:
    ref = lender.lend_kv(33, 16, 100, ("router", "r1"), 0.0)
    assert ref.nbytes == 300
    pieces = [wire.Piece(8192 + 4096 * i, 100) for i in range(3)]
    lender.lend_again(ref.slot, ("router", "r1"), 0.0)
    claim(lender, ref, 1)
    lender.ready(ref.slot, pieces[:2], last=False, note=b"")
    assert only(lender) == wire.Ready(1, 0, tuple(pieces[:2]), False)
    claim(lender, ref, 2)
    assert only(lender) == wire.Ready(2, 0, tuple(pieces[:2]), False)
    lender.ready(ref.slot, pieces[2:], last=False, note=b"")
    lender.ready(ref.slot, [], last=True, note=b"done")
    tail = [(c, m) for c in (1, 2) for m in (wire.Ready(c, 2, (pieces[2],), False),
                                             wire.Ready(c, 3, (), True, b"done"))]  # fmt: skip
    assert Counter(sent(lender)) == Counter(message for _, message in tail)
    assert lender.state(ref.slot) is SlotState.READY


def test_a_wrong_amount_of_bytes_is_our_own_bug(lender: Lender) -> None:
    ref = embedding(lender)
    with pytest.raises(AssertionError):
        lender.ready(ref.slot, [wire.Piece(0, 47)], last=True, note=b"")
    with pytest.raises(AssertionError):
        lender.ready(ref.slot, [wire.Piece(0, 49)], last=False, note=b"")
    assert lender.state(ref.slot) is SlotState.FILLING
    lender.ready(ref.slot, [PIECE], last=True, note=b"")
    with pytest.raises(IllegalTransition):
        lender.ready(ref.slot, [], last=True, note=b"")
    with pytest.raises(IllegalTransition):
        lender.fail(ref.slot, BadMedia("x"))


def test_claim_takes_over_exactly_one_lease_of_its_request(lender: Lender) -> None:
    ref = embedding(lender)
    lender.lend_again(ref.slot, ("router", "r2"), 0.0)
    claim(lender, ref, 1)
    assert sent(lender) == []
    claim(lender, ref, 2)  # the request has no second lease
    denied(lender, "SlotGone", "no lease of request r1")
    claim(lender, ref, 2, request="r2")
    claim(lender, ref, 3, request="r3")
    denied(lender, "SlotGone", "no lease of request r3")
    assert lender.leases(ref.slot) == 2
    lender.session_lost("router")  # holds nothing any more
    assert lender.leases(ref.slot) == 2


def test_the_same_image_twice_in_one_request(lender: Lender) -> None:
    ref = embedding(lender)
    assert lender.lend_again(ref.slot, ("router", "r1"), 0.0) == ref
    claim(lender, ref, 1)
    claim(lender, ref, 2)
    assert sent(lender) == []
    lender.release("consumer", wire.Release(1))
    assert lender.idle == []
    lender.release("consumer", wire.Release(2))
    assert lender.idle == [ref.slot]


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"nonce": "nonce-b"}, "WorkerLost", "process that is gone"),
        ({"generation": 9}, "SlotGone", "expired"),
        ({"slot": 99}, "SlotGone", "expired"),
        ({"nbytes": 4}, "TransferFailed", "altered"),
        ({"shape": (9, 9, 9)}, "TransferFailed", "altered"),
    ],
)
def test_refs_that_are_not_ours(
    lender: Lender, change: dict[str, object], kind: str, words: str
) -> None:
    ref = embedding(lender)
    claim(lender, msgspec.structs.replace(ref, **change))
    denied(lender, kind, words)
    assert lender.leases(ref.slot) == 1


def test_slot_numbers_and_generations_never_come_back(lender: Lender) -> None:
    first = embedding(lender)
    lender.cancel("r1", Cancelled("x"))
    lender.close_slot(first.slot)
    second = embedding(lender)
    assert second.slot != first.slot
    assert second.generation > first.generation
    claim(lender, first)
    denied(lender, "SlotGone", "expired")
    assert lender.state(first.slot) is SlotState.CLOSED


def test_a_claim_number_is_used_once(lender: Lender) -> None:
    first, second = embedding(lender), embedding(lender, "r2")
    claim(lender, first, 1)
    claim(lender, second, 1, request="r2")
    denied(lender, "TransferFailed", "number is in use")
    claim(lender, second, 1, request="r2", session="another consumer")
    assert sent(lender) == []


def test_validate_is_true_only_while_the_lease_lives(lender: Lender) -> None:
    ref = embedding(lender)
    claim(lender, ref, 1)
    lender.validate("consumer", wire.Validate(1, 0, 1))
    assert only(lender) == wire.Expired(1)  # nothing was ready
    lender.ready(ref.slot, [PIECE], last=True, note=b"")
    sent(lender)
    lender.validate("consumer", wire.Validate(1, 0, 1))
    assert only(lender) == wire.Valid(1, 0, 1)
    for first, count in ((0, 2), (1, 1), (-1, 1), (1, -1)):
        lender.validate("consumer", wire.Validate(1, first, count))
        assert only(lender) == wire.Expired(1)
    lender.validate("stranger", wire.Validate(1, 0, 1))
    assert only(lender) == wire.Expired(1)
    lender.release("consumer", wire.Release(1))
    lender.validate("consumer", wire.Validate(1, 0, 1))
    assert only(lender) == wire.Expired(1)


def test_fail_before_and_after_claim(lender: Lender) -> None:
    ref = embedding(lender)
    lender.lend_again(ref.slot, ("router", "r2"), 0.0)
    claim(lender, ref, 1)
    lender.fail(ref.slot, BadMedia("truncated", item=3))
    assert only(lender) == wire.Denied(1, "BadMedia", "truncated", 3)
    assert lender.leases(ref.slot) == 1
    claim(lender, ref, 2, request="r2")
    assert only(lender) == wire.Denied(2, "BadMedia", "truncated", 3)
    assert lender.idle == [ref.slot]
    lender.close_slot(ref.slot)


def test_cancel_is_idempotent_and_tells_the_consumer(lender: Lender) -> None:
    ref, other = embedding(lender), embedding(lender)
    keeps = embedding(lender, "r2")
    claim(lender, ref, 1)
    for _ in range(2):
        lender.cancel("r1", Cancelled("gone"))
    assert only(lender) == wire.Denied(1, "Cancelled", "gone")
    assert sorted(lender.idle) == [ref.slot, other.slot]
    assert lender.leases(keeps.slot) == 1
    lender.release("consumer", wire.Release(1))
    claim(lender, other, 2)
    denied(lender, "SlotGone", "no lease")


def test_a_lost_session_drops_all_it_holds_and_nothing_else(lender: Lender) -> None:
    mine, unclaimed = embedding(lender), embedding(lender)
    others = embedding(lender, "r2")
    claim(lender, mine, 1)
    claim(lender, others, 1, request="r2", session="b")
    for _ in range(2):
        lender.session_lost("consumer")
    assert lender.idle == [mine.slot]
    lender.session_lost("router")
    assert lender.idle == [mine.slot, unclaimed.slot]
    assert lender.leases(others.slot) == 1
    assert sent(lender) == []


def test_silence_ends_leases_and_any_message_renews_them(lender: Lender) -> None:
    ref, other = embedding(lender, now=0.0), embedding(lender, "r2", now=0.0)
    claim(lender, ref, 1, now=10.0)
    lender.expire(LEASE_S)
    assert lender.idle == []
    lender.expire(LEASE_S + 1)
    assert lender.idle == [other.slot]  # the router's; the consumer was heard at 10
    lender.heard("consumer", 65.0)
    lender.expire(125.0)
    assert lender.leases(ref.slot) == 1
    lender.expire(125.1)
    assert only(lender) == wire.Expired(1)
    assert lender.leases(ref.slot) == 0
    lender.heard("consumer", 200.0)
    lender.validate("consumer", wire.Validate(1, 0, 0))
    assert only(lender) == wire.Expired(1)


def test_a_session_that_has_ended_cannot_hold_what_it_is_lent(lender: Lender) -> None:
    """A request may outlive the channel that it came by: it waited for room, and lends now."""
    lender.session_lost("router")
    ref = embedding(lender, now=1.0)
    assert (lender.leases(ref.slot), lender.idle) == (1, [])  # not from within the call
    lender.expire(1.0)
    assert (lender.leases(ref.slot), lender.idle) == (0, [ref.slot])
    for number in range(REMEMBERED_SESSIONS):
        lender.session_lost(f"s{number}")
    assert len(lender._gone) == REMEMBERED_SESSIONS


def test_what_happened_is_counted(lender: Lender) -> None:
    ref, silent = embedding(lender), embedding(lender, "r2")
    claim(lender, msgspec.structs.replace(ref, nonce="other"))
    claim(lender, msgspec.structs.replace(ref, slot=99))
    claim(lender, msgspec.structs.replace(ref, nbytes=4))
    claim(lender, ref, request="r3")
    claim(lender, ref)
    claim(lender, ref)
    lender.fail(ref.slot, BadMedia("x"))
    claim(lender, silent, request="r2")
    assert lender.n_leases == 1
    lender.expire(LEASE_S + 1)
    assert lender.n_leases == 0
    refused = ["another process", "slot gone", "altered ref", "no lease", "number in use", "failed"]
    assert lender.tally == Counter({**dict.fromkeys(refused, 1), EXPIRED: 1})


def test_only_whole_ready_pieces_of_own_claims_may_be_read(lender: Lender) -> None:
    ref = embedding(lender)
    piece = (PIECE.offset, PIECE.nbytes)
    assert not lender.may_read("router", [piece])
    claim(lender, ref, 1)
    assert not lender.may_read("consumer", [piece])  # not ready
    lender.ready(ref.slot, [PIECE], last=True, note=b"")
    assert lender.may_read("consumer", [piece])
    assert lender.may_read("consumer", [piece, piece])
    assert not lender.may_read("router", [piece])
    assert not lender.may_read("stranger", [piece])
    for offset, nbytes in ((8192, 47), (8193, 47), (8191, 48), (8192, 49), (0, 48)):
        assert not lender.may_read("consumer", [piece, (offset, nbytes)])
    lender.release("consumer", wire.Release(1))
    assert not lender.may_read("consumer", [piece])


def test_a_leased_slot_is_not_closed(lender: Lender) -> None:
    ref = embedding(lender)
    with pytest.raises(AssertionError):
        lender.close_slot(ref.slot)


class Traffic:
    """Random events, beside the obvious version of the book: a list of live leases."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.lender = Lender("http://here:1", "n", LEASE_S)
        self.live: list[tuple[int, str, str, int | None]] = []
        """(slot, request, holder, claim)."""
        self.lapsed: set[tuple[int, str]] = set()
        """(slot, request): the consumer had claimed it, and released it or lost its session."""
        self.refs: dict[int, EmbeddingRef] = {}
        self.claims = 0
        self.steps = [self.lend, self.again, self.claim, self.claim, self.release, self.tidy]
        self.steps += 3 * self.steps + [self.cancel, self.lose]

    def request(self) -> str:
        return f"r{self.draw.randrange(6)}"

    def session(self) -> str:
        return f"s{self.draw.randrange(3)}"

    def lend(self) -> None:
        request = self.request()
        ref = embedding(self.lender, request)
        self.refs[ref.slot] = ref
        self.live.append((ref.slot, request, "router", None))

    def again(self) -> None:
        if self.refs:
            slot, request = self.draw.choice(list(self.refs)), self.request()
            self.lender.lend_again(slot, ("router", request), 0.0)
            self.live.append((slot, request, "router", None))

    def claim(self) -> None:
        if self.refs:
            self.claims += 1
            slot, request, session = (
                self.draw.choice(list(self.refs)), self.request(), self.session()
            )  # fmt: skip
            claim(self.lender, self.refs[slot], self.claims, request=request, session=session)
            if (slot, request, "router", None) in self.live:
                self.live.remove((slot, request, "router", None))
                self.live.append((slot, request, session, self.claims))
            elif (slot, request) in self.lapsed:
                self.lapsed.remove((slot, request))
                self.live.append((slot, request, session, self.claims))

    def release(self) -> None:
        number, session = self.draw.randrange(self.claims + 1), self.session()
        self.lender.release(session, wire.Release(number))
        self.lapsed |= {x[:2] for x in self.live if x[2:] == (session, number)}
        self.live = [x for x in self.live if x[2:] != (session, number)]

    def cancel(self) -> None:
        request = self.request()
        self.lender.cancel(request, TriptychError("x"))
        self.live = [x for x in self.live if x[1] != request]
        self.lapsed = {x for x in self.lapsed if x[1] != request}

    def lose(self) -> None:
        session = self.session()
        self.lender.session_lost(session)
        self.lapsed |= {x[:2] for x in self.live if x[2] == session and x[3] is not None}
        self.live = [x for x in self.live if x[2] != session]

    def tidy(self) -> None:
        for slot in [slot for slot in self.refs if self.lender.leases(slot) == 0]:
            self.lender.close_slot(slot)
            del self.refs[slot]


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_left_behind_by_any_order_of_events(seed: int) -> None:
    traffic = Traffic(seed)
    lender = traffic.lender
    for _ in range(1000):
        traffic.draw.choice(traffic.steps)()
        expected = Counter(slot for slot, *_ in traffic.live)
        assert {slot: lender.leases(slot) for slot in traffic.refs} == {
            slot: expected[slot] for slot in traffic.refs
        }
        claimed = {(holder, number) for *_, holder, number in traffic.live if number is not None}
        assert set(lender._claims) == claimed
    assert traffic.claims > 100
    for session in ("router", "s0", "s1", "s2"):
        lender.session_lost(session)
    assert not lender._claims and not lender._by_holder
    assert not lender._by_request and not lender._heard
