from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from triptych.errors import TransferFailed
from triptych.transfer import mover as module
from triptych.transfer.mover import Mover


@pytest.fixture
def mover() -> Iterator[Mover]:
    subject = Mover()
    yield subject
    subject.close()


async def test_jobs_run_in_order_on_one_thread_and_leave_the_loop_free(mover: Mover) -> None:
    order: list[int] = []
    threads: set[int] = set()

    def job(number: int, left: float) -> int:
        assert 0 < left <= 5.0
        time.sleep(0.02)
        order.append(number)
        threads.add(threading.get_ident())
        return number

    tasks = [
        asyncio.create_task(mover.run(lambda left, n=n: job(n, left), 5.0))  # type: ignore[misc]
        for n in range(5)
    ]
    ticks = 0
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0.005)
        ticks += 1
    assert [task.result() for task in tasks] == order == list(range(5))
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    assert ticks > 5


async def test_the_jobs_own_error_comes_out(mover: Mover) -> None:
    def job(left: float) -> None:
        raise TransferFailed("mine", quarantine_s=2.0)

    with pytest.raises(TransferFailed, match="mine") as caught:
        await mover.run(job, 1.0)
    assert caught.value.quarantine_s == 2.0


async def test_a_job_cancelled_in_the_queue_never_runs(mover: Mover) -> None:
    ran = []
    first = asyncio.create_task(mover.run(lambda left: time.sleep(0.1), 5.0))
    second = asyncio.create_task(mover.run(lambda left: ran.append(1), 5.0))
    await asyncio.sleep(0.02)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert not first.done()
    await first
    assert ran == []


async def test_a_busy_thread_is_no_danger_to_the_destination(mover: Mover) -> None:
    first = asyncio.create_task(mover.run(lambda left: time.sleep(0.2), 5.0))
    await asyncio.sleep(0.02)
    with pytest.raises(TransferFailed, match="busy") as caught:
        await mover.run(lambda left: None, 0.05, grace_s=0.0)
    assert caught.value.quarantine_s == 0
    await first


async def test_a_stuck_job_puts_its_destination_in_quarantine(mover: Mover) -> None:
    release = threading.Event()
    with pytest.raises(TransferFailed, match="did not come back") as caught:
        await mover.run(lambda left: release.wait(5.0), 0.05, grace_s=0.05)
    assert caught.value.quarantine_s == module.STUCK_QUARANTINE_S
    release.set()


async def test_cancelling_waits_out_the_quarantine_of_a_read_that_failed(mover: Mover) -> None:
    def job(left: float) -> None:
        time.sleep(0.05)
        raise TransferFailed("late bytes", quarantine_s=0.2)

    start = time.monotonic()
    task = asyncio.create_task(mover.run(job, 5.0))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - start >= 0.25


async def test_a_closed_mover_takes_nothing() -> None:
    subject = Mover()
    done = threading.Event()
    subject.post(done.set)
    subject.close()
    assert done.wait(5.0)  # what was queued still runs
    subject.post(done.clear)
    with pytest.raises(TransferFailed, match="closed"):
        await subject.run(lambda left: None, 1.0)
    assert done.is_set()
