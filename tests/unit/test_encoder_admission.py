"""When a request that found no room in the encoder's pool is told to come again."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.encoder.admission import Admission, Given, retry_after
from triptych.encoder.scheduler import RETRY_AFTER_S
from triptych.errors import Overloaded
from triptych.transfer.pool import Pool

PAGE = 4096


def test_it_follows_from_what_was_given_out_meanwhile() -> None:
    lately = [Given(91.0, 300), Given(99.0, 100)]
    assert retry_after(800, lately, 100.0, 10.0) == pytest.approx(20.0)
    assert retry_after(200, lately, 100.0, 10.0) == pytest.approx(5.0)
    # What was given before it waited may have been free already.
    assert retry_after(400, [Given(89.0, 10_000), *lately], 100.0, 10.0) == pytest.approx(10.0)
    assert retry_after(400, lately, 100.0, 5.0) == pytest.approx(20.0)


def test_where_nothing_was_given_out_it_is_as_long_again() -> None:
    assert retry_after(800, [], 100.0, 30.0) == 30.0
    assert retry_after(800, [Given(10.0, 50)], 100.0, 30.0) == 30.0


@given(
    st.integers(1, 1 << 40),
    st.lists(st.tuples(st.floats(0, 100), st.integers(1, 1 << 40)), max_size=5),
    st.floats(0, 1000),
)
def test_it_is_a_second_to_a_minute(
    nbytes: int, grants: list[tuple[float, int]], waited_s: float
) -> None:
    shortest, longest = RETRY_AFTER_S
    found = retry_after(nbytes, [Given(*grant) for grant in grants], 100.0, waited_s)
    assert shortest == 1.0 <= found <= longest == 60.0


async def test_those_that_still_wait_come_first() -> None:
    pool = Pool(0, 8 * PAGE)
    admission = Admission(pool)
    extents = await admission.take([PAGE] * 8, "r0", 1.0)
    first = asyncio.create_task(admission.take([4 * PAGE], "r1", 1.5))
    others = [asyncio.create_task(admission.take([4 * PAGE], f"r{n}", 60.0)) for n in (2, 3, 4)]
    await asyncio.sleep(0.2)
    pool.free(extents[0])
    await admission.take([PAGE], "r5", 1.0)
    with pytest.raises(Overloaded, match="within 1.5 s") as refused:
        await first
    # A page was given out in a second and a half, and sixteen are wanted.
    assert refused.value.retry_after_s == pytest.approx(1.5 * 16)
    admission.close()
    await asyncio.gather(*others, return_exceptions=True)
    assert pool.free_nbytes == 0


async def test_nothing_is_remembered_for_longer_than_it_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr("triptych.encoder.admission.time.monotonic", lambda: now)
    pool = Pool(0, 8 * PAGE)
    admission = Admission(pool)
    for _ in range(1000):
        pool.free_all(admission.take_now([PAGE]))
        now += 1.0
    assert len(admission._given) <= RETRY_AFTER_S[1] + 1
