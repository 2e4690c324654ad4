"""A worker's way out, with nothing around it."""

from __future__ import annotations

import asyncio

from triptych import wire
from triptych.stage.draining import Drain

SOON_S = 5.0


class Worker:
    def __init__(self) -> None:
        self.runs = True
        self.said: list[wire.Message] = []
        self.drain = Drain(lambda: self.runs, self.said.append)


async def test_it_waits_for_the_router_and_for_what_runs() -> None:
    worker = Worker()
    worker.drain.begin(registered=True)
    worker.drain.begin(registered=True)
    assert worker.said == [wire.Draining()]
    worker.runs = False
    assert not await worker.drain.wait(0.1)  # the router may send more
    worker.runs = True
    worker.drain.unneeded()
    assert not await worker.drain.wait(0.1)
    worker.runs = False
    assert await worker.drain.wait(SOON_S)
    assert worker.said == [wire.Draining(), wire.Draining(done=True)]
    assert await worker.drain.wait(SOON_S)


async def test_without_a_router_what_runs_is_all() -> None:
    worker = Worker()
    worker.runs = False
    worker.drain.begin(registered=False)
    assert await worker.drain.wait(SOON_S)


async def test_who_hurries_waits_no_longer() -> None:
    worker = Worker()
    worker.drain.begin(registered=True)
    waiting = asyncio.create_task(worker.drain.wait(1000))
    await asyncio.sleep(0)
    worker.drain.hurry()
    assert not await asyncio.wait_for(waiting, SOON_S)
    worker.drain.close()
