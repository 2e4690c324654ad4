"""What the router takes on, and when it says to come again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.errors import Overloaded
from triptych.router.admission import LEAST_S, MOST_S, Admission, Pace, Place

MANY = 1 << 40


def refused(admission: Admission, now: float) -> float:
    with pytest.raises(Overloaded) as caught:
        admission.enter(now)
    return caught.value.retry_after_s


# ------------------------------------------------------------------ requests and bytes


def test_so_many_requests_and_no_more() -> None:
    admission = Admission(2, MANY)
    first, _ = admission.enter(0.0), admission.enter(0.0)
    with pytest.raises(Overloaded, match="2 requests are in progress"):
        admission.enter(1.0)
    first.leave(2.0)
    first.leave(2.0)
    assert admission.requests == 1
    admission.enter(2.0)


def test_so_many_bytes_and_no_more() -> None:
    admission = Admission(10, 100)
    first, second = admission.enter(0.0), admission.enter(0.0)
    first.hold(60, 0.0)
    second.hold(40, 0.0)
    with pytest.raises(Overloaded, match="more than 100 bytes"):
        second.hold(1, 0.0)
    first.drop(20)
    second.hold(20, 0.0)
    first.leave(1.0)
    second.leave(1.0)
    assert (admission.requests, admission.nbytes) == (0, 0)


def test_one_by_itself_may_hold_more() -> None:
    admission = Admission(10, 100)
    large = admission.enter(0.0)
    large.hold(1000, 0.0)
    with pytest.raises(Overloaded):
        admission.enter(0.0).hold(1, 0.0)
    large.hold(1000, 0.0)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60)), max_size=60))
def test_what_is_counted_is_what_is_held(steps: list[tuple[int, int]]) -> None:
    admission = Admission(5, 100)
    held: list[Place] = []
    for now, (action, amount) in enumerate(steps):
        try:
            if action == 0 or not held:
                held.append(admission.enter(now))
            elif action == 1:
                held[amount % len(held)].hold(amount, now)
            else:
                held.pop(amount % len(held)).leave(now)
        except Overloaded as error:
            assert LEAST_S <= error.retry_after_s <= MOST_S
        assert admission.requests == len(held) <= 5
        assert admission.nbytes == sum(place.nbytes for place in held)
        assert admission.nbytes <= 100 or sum(place.nbytes > 0 for place in held) == 1


# ------------------------------------------------------------------ when to come again


@pytest.mark.parametrize("every_s", [2.0, 5.0, 20.0])
def test_it_is_when_a_request_ends_at_the_pace_of_late(every_s: float) -> None:
    admission, now = Admission(2, MANY), 1000.0
    running = [admission.enter(now), admission.enter(now)]
    for _ in range(40):
        now += every_s
        running.pop(0).leave(now)
        running.append(admission.enter(now))
    assert refused(admission, now) == pytest.approx(every_s, rel=0.5)


def test_each_that_is_refused_is_told_of_a_place_of_its_own() -> None:
    admission, now = Admission(1, MANY), 0.0
    running = admission.enter(now)
    for _ in range(50):
        now += 3.0
        running.leave(now)
        running = admission.enter(now)
    first, second, third = (refused(admission, now) for _ in range(3))
    assert second == pytest.approx(2 * first) and third == pytest.approx(3 * first)
    now += 3.0
    running.leave(now)
    admission.enter(now)
    assert refused(admission, now) == pytest.approx(first, rel=0.1)


def test_the_longer_nothing_ends_the_later() -> None:
    admission, now = Admission(2, MANY), 0.0
    running = admission.enter(now)
    admission.enter(now)
    for _ in range(20):
        now += 2.0
        running.leave(now)
        running = admission.enter(now)
    assert refused(admission, now + 60) > 2 * 2.0


def test_nothing_is_known_at_first() -> None:
    assert Pace().seconds_for(100, 5.0) == LEAST_S
    admission = Admission(1, MANY)
    admission.enter(7.0)
    assert refused(admission, 8.0) == LEAST_S


def test_idle_time_is_not_slowness() -> None:
    pace = Pace()
    now = 50.0
    pace.begin(now)
    for _ in range(30):
        now += 1.0
        pace.done(10, now)
    at_once = pace.seconds_for(100, now)
    pace.pause(now)
    pace.pause(now + 5)
    pace.begin(now + 10_000)
    pace.begin(now + 10_001)
    assert pace.seconds_for(100, now + 10_000) == pytest.approx(at_once)
    assert at_once == pytest.approx(10.0, rel=0.1)


def test_a_minute_or_two_at_most() -> None:
    pace = Pace()
    pace.begin(1.0)
    pace.done(1, 2.0)
    assert pace.seconds_for(10**9, 3.0) == MOST_S
    assert pace.seconds_for(0, 3.0) == LEAST_S
