"""Leases that ended against their consumer's will, and who may have them again."""

from __future__ import annotations

from tests.unit.test_session import LEASE_S, PIECE, claim, embedding, lender, only
from triptych import wire
from triptych.errors import TriptychError
from triptych.transfer.session import REMEMBERED_LAPSES, Lender

__all__ = ["lender"]  # the fixture


def test_a_consumer_that_was_held_up_may_claim_again_while_the_slot_is_there(
    lender: Lender,
) -> None:
    ref = embedding(lender, now=0.0)
    lender.ready(ref.slot, [PIECE], last=True, note=b"")
    claim(lender, ref, 1, now=0.0)
    lender.expire(LEASE_S + 1)
    lender.outbox.clear()
    claim(lender, ref, 2, request="r2", now=70.0)
    assert isinstance(only(lender), wire.Denied)  # another request never had a lease
    claim(lender, ref, 3, now=70.0)
    assert isinstance(only(lender), wire.Ready)
    assert (lender.leases(ref.slot), lender.n_leases) == (1, 1)
    claim(lender, ref, 4, now=70.0)
    assert isinstance(only(lender), wire.Denied)  # once for each time it lapsed
    lender.session_lost("consumer")
    claim(lender, ref, 5, session="the same process", now=71.0)
    assert isinstance(only(lender), wire.Ready)
    lender.session_lost("the same process")
    lender.close_slot(ref.slot)
    claim(lender, ref, 6, session="again", now=72.0)
    assert isinstance(only(lender), wire.Denied)


def test_what_was_released_or_cancelled_cannot_be_claimed_again(lender: Lender) -> None:
    released = lender.lend_kv(16, 16, 64, ("router", "r0"), 0.0)
    cancelled, unclaimed = (embedding(lender, f"r{n}") for n in (1, 2))
    lender.claim("consumer", wire.Claim(1, released, "r0"), 0.0)
    claim(lender, cancelled, 2, request="r1")
    lender.release("consumer", wire.Release(1))
    lender.session_lost("consumer")
    lender.cancel("r1", TriptychError("x"))
    lender.session_lost("router")
    for number, ref in enumerate((released, cancelled, unclaimed)):
        lender.claim("late", wire.Claim(10 + number, ref, f"r{number}"), 0.0)
        denied = only(lender)
        assert isinstance(denied, wire.Denied) and denied.error == "SlotGone"


def test_an_embedding_that_was_released_can_while_it_is_there(lender: Lender) -> None:
    ref = embedding(lender)
    lender.ready(ref.slot, [wire.Piece(0, ref.nbytes)], last=True, note=b"")
    for number in range(1, 4):
        claim(lender, ref, number)
        assert isinstance(only(lender), wire.Ready)
        assert (lender.leases(ref.slot), lender.n_leases) == (1, 1)
        lender.release("consumer", wire.Release(number))
        assert lender.n_leases == 0
    lender.cancel("r1", TriptychError("x"))  # its end
    claim(lender, ref, 4)
    assert isinstance(only(lender), wire.Denied)
    lender.close_slot(ref.slot)


def test_so_many_lapses_are_remembered(lender: Lender) -> None:
    for number in range(REMEMBERED_LAPSES + 10):
        claim(lender, embedding(lender, f"r{number}"), number, request=f"r{number}")
    lender.session_lost("consumer")
    assert len(lender._lapsed) == REMEMBERED_LAPSES
