"""What the encoder's pool keeps, beside the obvious way to count it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from triptych.encoder.kept import Kept
from triptych.transfer.pool import Extent


@given(st.lists(st.tuples(st.sampled_from(["lease", "cache", "forget"]), st.integers(0, 5))))
def test_bytes_are_those_of_the_slots(steps: list[tuple[str, int]]) -> None:
    subject, states = Kept(), dict.fromkeys(range(6), "forget")
    extents = [Extent(1000 * slot, 10**slot, slot + 1) for slot in range(6)]
    for step, slot in steps:
        if step == "forget":
            subject.forget(slot)
        else:
            getattr(subject, step)(slot, extents[slot])
        states[slot] = step
        leased, cached = (
            [extents[slot] for slot, state in states.items() if state == wanted]
            for wanted in ("lease", "cache")
        )
        assert subject.full() == (sum(e.nbytes for e in leased), sum(e.nbytes for e in cached))
        assert sorted(e.offset for e in subject.evictable()) == [e.offset for e in cached]


def test_who_has_been_cached_for_longest_is_named_first() -> None:
    subject = Kept()
    extents = [Extent(1000 * slot, 1, slot + 1) for slot in range(3)]
    for slot in (2, 0, 1):
        subject.cache(slot, extents[slot])
    subject.lease(2, extents[2])
    subject.cache(2, extents[2])
    assert [extent.offset for extent in subject.evictable()] == [0, 1000, 2000]
