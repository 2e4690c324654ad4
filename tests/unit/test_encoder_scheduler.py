"""Batching of images: budgets, order, ageing, cancelling."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.encoder.scheduler import (
    AHEAD_BATCHES,
    PASSES,
    URGENT_BATCHES,
    EncodeScheduler,
    retry_after,
)
from triptych.errors import Overloaded

BUDGET = 100


def scheduler(**changes: int) -> EncodeScheduler:
    settings = {
        "batch_patches": BUDGET,
        "queue_patches": 1000,
        "queue_nbytes": 1000,
        "preparers": 2,
    }
    return EncodeScheduler(**{**settings, **changes})


def prepare_all(subject: EncodeScheduler) -> list[int]:
    order = []
    while (number := subject.next_to_prepare()) is not None:
        order.append(number)
        subject.prepared(number)
    return order


def test_a_batch_is_filled_up_to_its_budget_shortest_first() -> None:
    subject = scheduler()
    for number, patches in enumerate([60, 10, 50, 30, 90]):
        subject.add(number, patches, 1, patches)
    assert prepare_all(subject) == [1, 3, 2, 0, 4]
    assert subject.next_batch() == [1, 3, 2]
    assert subject.next_batch() == [0]
    assert subject.next_batch() == [4]
    assert subject.next_batch() == []


def test_an_image_larger_than_the_budget_runs_alone() -> None:
    subject = scheduler()
    subject.add(1, 5 * BUDGET, 1, 5 * BUDGET)
    subject.add(2, BUDGET, 1, BUDGET)
    assert subject.next_to_prepare() == 2
    subject.prepared(2)
    assert subject.next_batch() == [2]
    assert prepare_all(subject) == [1]
    assert subject.next_batch() == [1]


def run(subject: EncodeScheduler) -> list[int]:
    """Prepare what may be prepared; one forward, at once ended."""
    prepare_all(subject)
    batch = subject.next_batch()
    for number in batch:
        subject.done(number)
    return batch


def test_a_short_request_passes_the_images_of_long_ones() -> None:
    subject = scheduler(queue_patches=10_000)
    for request in range(4):
        for image in range(32):
            subject.add(100 * request + image, 10, 1, 320)
    for _ in range(8):
        run(subject)
    subject.add(1000, 10, 1, 10)
    assert run(subject) == [1000]
    assert len(run(subject)) == 10


def test_short_requests_fill_a_batch_together() -> None:
    subject = scheduler()
    for number in range(20):
        subject.add(number, 10, 1, 10 if number < 15 else 100)
    assert run(subject) == list(range(10))
    assert run(subject) == list(range(10, 15))
    assert run(subject) == list(range(15, 20))


def test_equal_requests_are_served_one_after_the_other() -> None:
    subject = scheduler()
    for request in range(3):
        for image in range(20):
            subject.add(100 * request + image, 10, 1, 200)
    ran = [number for _ in range(6) for number in run(subject)]
    assert ran == sorted(ran) and len(ran) == 60


def test_a_long_request_is_not_passed_for_ever() -> None:
    subject = scheduler()
    subject.add(0, BUDGET, 1, BUDGET)
    passed = 0
    for number in range(1, 1000):
        subject.add(number, BUDGET // 2, 1, BUDGET // 2)
        (ran,) = run(subject)
        if ran == 0:
            break
        passed += BUDGET // 2
    assert PASSES * BUDGET // 2 <= passed <= PASSES * BUDGET


def test_urgent_work_is_prepared_although_much_is_prepared_already() -> None:
    subject = scheduler(preparers=100)
    for number in range(10):
        subject.add(number, BUDGET, 1, 10 * BUDGET)
    assert len(prepare_all(subject)) == AHEAD_BATCHES
    small = range(20, 20 + 10 * URGENT_BATCHES)
    for number in small:
        subject.add(number, BUDGET // 5, 1, BUDGET // 5)
    assert len(prepare_all(subject)) == 5  # what fits into the next forward
    assert subject.next_batch() == [20, 21, 22, 23, 24]


def test_preparation_does_not_run_far_ahead_of_the_forward() -> None:
    subject = scheduler(preparers=100)
    for number in range(10):
        subject.add(number, BUDGET, 1, BUDGET)
    started = []
    while (number := subject.next_to_prepare()) is not None:
        started.append(number)
    assert len(started) == AHEAD_BATCHES
    for number in started:
        subject.prepared(number)
    assert subject.next_to_prepare() is None
    assert subject.next_batch() == [started[0]]
    assert subject.next_to_prepare() is not None
    assert subject.next_to_prepare() is None


def test_an_image_larger_than_a_batch_is_one_when_preparation_runs_ahead() -> None:
    """As many are under way as of images that fill a batch: the forward is fed all the same."""
    subject = scheduler(preparers=10)
    for number in range(10):
        subject.add(number, BUDGET + BUDGET // 3, 1, 10 * (BUDGET + BUDGET // 3))
    assert prepare_all(subject) == list(range(AHEAD_BATCHES))
    assert subject.next_batch() == [0]
    assert subject.next_to_prepare() == AHEAD_BATCHES
    assert subject.next_to_prepare() is None


def test_no_more_images_in_preparation_than_threads() -> None:
    subject = scheduler(preparers=2)
    for number in range(3):
        subject.add(number, 1, 1, 1)
    assert [subject.next_to_prepare() for _ in range(3)] == [0, 1, None]
    subject.done(0)  # its preparation failed
    assert subject.next_to_prepare() == 2


def test_cancel_forgets_all_but_what_runs() -> None:
    subject = scheduler(preparers=1)
    for number in range(4):
        subject.add(number, BUDGET // 2, 1, BUDGET // 2)
    subject.next_to_prepare()
    subject.prepared(0)
    assert subject.next_batch() == [0]
    subject.next_to_prepare()
    subject.prepared(1)
    subject.next_to_prepare()
    assert [subject.cancel(number) for number in range(4)] == [False, True, True, True]
    assert subject.cancel(1)
    assert subject.next_to_prepare() is None
    assert subject.next_batch() == []
    subject.done(0)
    assert subject.cancel(0)


def test_the_queue_is_bounded_in_patches_and_bytes() -> None:
    subject = scheduler(queue_patches=100, queue_nbytes=50, preparers=1)
    subject.check_room(1000, 1000)  # an empty queue takes anything: the pool decides
    subject.add(1, 90, 45, 90)
    subject.check_room(10, 5)
    with pytest.raises(Overloaded, match="100 vision patches"):
        subject.check_room(11, 0)
    with pytest.raises(Overloaded, match="50 bytes"):
        subject.check_room(0, 6)
    prepare_all(subject)
    subject.next_batch()
    subject.check_room(100, 50)  # what runs does not wait


def refusal(subject: EncodeScheduler, patches: int, nbytes: int) -> float:
    with pytest.raises(Overloaded) as refused:
        subject.check_room(patches, nbytes)
    return refused.value.retry_after_s


def test_who_is_refused_is_told_when_there_will_be_room() -> None:
    for patches, nbytes, expected in (
        (500, 0, 5.0),
        (0, 20, 2.0),  # a fifth of the files
        (1, 0, 1.0),
        (100_000, 0, 10.0),  # an empty queue takes anything
    ):
        subject = scheduler(queue_patches=1000, queue_nbytes=100)
        subject.add(1, 1000, 100, 1000)
        assert refusal(subject, patches, nbytes) == 1.0  # nothing has been measured yet
        subject = scheduler(queue_patches=1000, queue_nbytes=100)
        subject.add(1, 1000, 100, 1000)
        subject.encoded(100, 1.0)
        assert refusal(subject, patches, nbytes) == pytest.approx(expected)
        for _ in range(50):
            subject.encoded(400, 1.0)
        assert refusal(subject, 1000, 0) == pytest.approx(2.5, rel=0.01)


def test_who_is_refused_after_others_is_told_to_come_after_them() -> None:
    subject = scheduler(queue_patches=1000, preparers=1)
    for number in range(2):
        subject.add(number, 500, 1, 500)
    subject.encoded(100, 1.0)
    assert [refusal(subject, 200, 0) for _ in range(3)] == pytest.approx([2, 4, 6])
    # Nobody waits for longer than the queue: those before it may never come again.
    assert [refusal(subject, 200, 0) for _ in range(4)] == pytest.approx([8, 10, 10, 10])
    subject.next_to_prepare()
    subject.prepared(0)
    assert subject.next_batch() == [0]
    # Of what was promised half has been encoded, and so has half of the queue.
    subject.check_room(500, 0)
    assert refusal(subject, 501, 0) == pytest.approx(5.0)
    subject.done(0)


def test_promises_are_forgotten_once_they_are_kept() -> None:
    subject = scheduler(queue_patches=1000, preparers=1)
    subject.encoded(100, 1.0)
    for number in range(4):
        subject.add(number, 1000, 1, 1000)
        assert refusal(subject, 100, 0) == pytest.approx(1.0)
        subject.next_to_prepare()
        subject.prepared(number)
        assert subject.next_batch() == [number]
        subject.done(number)


def test_times_to_come_again_are_bounded() -> None:
    assert retry_after(1000, 0.0) == 1.0
    assert retry_after(0, 10.0) == retry_after(10, 100.0) == 1.0
    assert retry_after(250, 100.0) == 2.5
    assert retry_after(1e9, 1.0) == 60.0


def test_a_phase_cannot_be_skipped() -> None:
    subject = scheduler()
    subject.add(1, 1, 1, 1)
    with pytest.raises(AssertionError, match="work 1"):
        subject.prepared(1)
    assert subject.next_to_prepare() == 1


@given(
    st.lists(st.tuples(st.integers(1, 250), st.integers(0, 500)), max_size=40),
    st.lists(st.integers(0, 39), max_size=10),
)
def test_everything_runs_once_within_budgets(
    work: list[tuple[int, int]], cancelled: list[int]
) -> None:
    subject = scheduler()
    patches = dict(enumerate(size for size, _ in work))
    for number, (size, others) in enumerate(work):
        subject.add(number, size, 1, size + others)
    for number in cancelled:
        assert subject.cancel(number)
        patches.pop(number, None)
    ran: list[int] = []
    for _ in range(3 * len(work) + 1):
        prepare_all(subject)
        batch = subject.next_batch()
        assert len(batch) <= 1 or sum(patches[number] for number in batch) <= BUDGET
        for number in batch:
            subject.done(number)
        ran.extend(batch)
    assert sorted(ran) == sorted(patches)
    subject.add(1000, 1, 1, 1)
    subject.check_room(999, 999)  # everything else has been taken off the queue's account
