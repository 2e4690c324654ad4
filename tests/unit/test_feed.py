"""The feed between an engine that asks, a small landing area, and encoders that are slow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from triptych import wire
from triptych.config import Timeouts
from triptych.engine.messages import Cramped, ItemLanded, Proven, Used, Vouched
from triptych.errors import SlotGone, TransferFailed, TriptychError
from triptych.refs import EmbeddingRef
from triptych.request import ItemMeta
from triptych.stage.feed import EmbeddingFeed
from triptych.transfer.pool import Pool

PAGE = 4096
META = ItemMeta("key", "", 1, None, 1, PAGE // 4, "float32")


def item(slot: int) -> wire.PrefillItem:
    ref = EmbeddingRef("http://here:1", "n", slot, 1, META.nbytes, "key", "float32", META.shape)
    return wire.PrefillItem(META, ref)


class Copy:
    """One that is proven when it is told to be."""

    transport, read_s = "http", 0.0

    def __init__(self) -> None:
        self.known: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.released = False

    async def validate(self) -> None:
        await asyncio.shield(self.known)

    def release(self) -> None:
        self.released = True
        if not self.known.done():
            self.known.set_exception(TransferFailed("given back before it was proven"))


class Encoder:
    """A consumer whose pulls end when they are told to."""

    def __init__(self) -> None:
        self.pulls: dict[tuple[str, int], asyncio.Future[None]] = {}
        self.copies: dict[tuple[str, int], Copy] = {}
        self.declined: list[tuple[str, int]] = []

    def in_place(self, owner: str) -> bool:
        return False

    async def opens_in_place(self, owner: str, timeout_s: float) -> bool:
        return False

    async def fetch(self, ref: EmbeddingRef, request_id: str, *_: Any) -> Copy:
        future = asyncio.get_running_loop().create_future()
        self.pulls[request_id, ref.slot] = future
        await future
        self.copies[request_id, ref.slot] = copy = Copy()
        return copy

    async def decline(self, ref: EmbeddingRef, request_id: str, timeout_s: float) -> None:
        self.declined.append((request_id, ref.slot))


class Region:
    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)


class Engine:
    def __init__(self) -> None:
        self.landed: list[tuple[str, int]] = []
        self.cramped: list[str] = []
        self.vouched: list[tuple[str, int]] = []
        self.proven: list[int] = []

    def submit(self, message: ItemLanded | Cramped | Vouched | Proven) -> None:
        match message:
            case Vouched():
                self.vouched.append((message.request_id, message.item))
            case Proven():
                self.proven.append(message.serial)
            case ItemLanded():
                self.landed.append((message.request_id, message.item))
            case Cramped():
                self.cramped.append(message.request_id)


class Rig:
    def __init__(self, pages: int) -> None:
        self.encoder, self.engine = Encoder(), Engine()
        self.pool = Pool(0, pages * PAGE)
        self.failed: dict[str, TriptychError] = {}
        self.feed = EmbeddingFeed(
            self.encoder,  # type: ignore[arg-type]
            Region(),  # type: ignore[arg-type]
            self.pool,
            self.engine,  # type: ignore[arg-type]
            Timeouts(),
            on_failed=self.failed.__setitem__,
            on_spans=lambda request_id, spans: None,
        )

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def pull(self, request_id: str, slot: int) -> None:
        """One that is under way ends."""
        self.encoder.pulls.pop((request_id, slot)).set_result(None)
        await self.settle()


@asynccontextmanager
async def rig(pages: int) -> AsyncIterator[Rig]:
    made = Rig(pages)
    yield made
    await made.feed.close()
    await made.settle()
    assert made.pool.used_nbytes == made.pool.quarantined_nbytes or made.engine.landed


async def test_nothing_comes_unasked_and_nothing_twice() -> None:
    async with rig(4) as r:
        r.feed.start("a", [item(0), item(1)])
        await r.settle()
        assert r.encoder.pulls == {}
        for _ in range(2):
            r.feed.wanted([("a", 1), ("nobody", 0)])
            await r.settle()
        assert list(r.encoder.pulls) == [("a", 1)]
        await r.pull("a", 1)
        r.feed.wanted([("a", 1)])
        await r.settle()
        assert r.engine.landed == [("a", 1)] and r.encoder.pulls == {}
        r.feed.consumed("a", 1)
        assert r.pool.used_nbytes == 0
        r.feed.wanted([("a", 1)])  # it has to be computed again
        await r.settle()
        await r.pull("a", 1)
        assert r.engine.landed == [("a", 1)] * 2
        r.feed.end("a")
        r.feed.consumed("a", 1)
        assert r.pool.used_nbytes == 0


async def test_room_is_taken_in_the_order_of_asking() -> None:
    async with rig(2) as r:
        for name in "ab":
            r.feed.start(name, [item(0), item(1)])
        r.feed.wanted([("a", 0), ("a", 1), ("b", 0), ("b", 1)])
        await r.settle()
        assert list(r.encoder.pulls) == [("a", 0), ("a", 1)]
        await r.pull("a", 1)
        r.feed.consumed("a", 1)
        await r.settle()
        assert list(r.encoder.pulls) == [("a", 0), ("b", 0)]
        for name in "ab":
            r.feed.end(name)
        await r.settle()
        assert r.pool.used_nbytes == 0


async def test_the_engine_is_told_at_once_whose_images_never_are_there_together() -> None:
    async with rig(2) as r:
        r.feed.start("a", [item(0), item(1), item(2)])
        r.feed.wanted([("a", 0), ("a", 1), ("a", 2)])
        await r.settle()
        assert r.engine.cramped == ["a"]
        await r.pull("a", 0)
        r.feed.consumed("a", 0)
        await r.settle()
        assert r.engine.cramped == ["a"] and list(r.encoder.pulls) == [("a", 1), ("a", 2)]
        r.feed.end("a")
        await r.settle()
        r.feed.consumed("a", 0)
        assert r.pool.used_nbytes == 0


async def test_whoever_waits_for_the_room_of_others_is_not_cramped() -> None:
    async with rig(2) as r:
        for name, n in (("a", 1), ("b", 2), ("c", 3)):
            r.feed.start(name, [item(index) for index in range(n)])
        r.feed.wanted([("a", 0), ("b", 0), ("b", 1), ("c", 0), ("c", 1), ("c", 2)])
        await r.settle()
        await r.pull("a", 0)
        r.feed.consumed("a", 0)
        await r.settle()
        assert list(r.encoder.pulls) == [("b", 0), ("b", 1)] and r.engine.cramped == []
        for index in (0, 1):
            await r.pull("b", index)
        r.feed.consumed("b", 0)
        await r.settle()
        assert r.engine.cramped == []  # the rest of b's room will come
        r.feed.consumed("b", 1)
        await r.settle()
        assert list(r.encoder.pulls) == [("c", 0), ("c", 1)] and r.engine.cramped == ["c"]
        for name in "abc":
            r.feed.end(name)
        await r.settle()
        assert r.pool.used_nbytes == 0


async def test_room_in_quarantine_is_nobodys() -> None:
    async with rig(3) as r:
        r.feed.start("a", [item(0), item(1), item(2)])
        r.feed.start("b", [item(0)])
        r.feed.wanted([("b", 0), ("a", 0), ("a", 1), ("a", 2)])
        await r.settle()
        assert r.engine.cramped == []
        r.encoder.pulls["b", 0].set_exception(TransferFailed("broken", quarantine_s=60.0))
        await r.settle()
        assert r.engine.cramped == ["a"] and isinstance(r.failed["b"], TransferFailed)
        for name in "ab":
            r.feed.end(name)
        await r.settle()
        assert r.pool.used_nbytes == r.pool.quarantined_nbytes == PAGE


async def test_what_is_withdrawn_makes_room_for_whoever_asks_next() -> None:
    """Though it was asked for before: its task waits for room, and others of it are being read."""
    async with rig(2) as r:
        for name in "ab":
            r.feed.start(name, [item(0), item(1), item(2)])
        r.feed.wanted([("b", 0), ("b", 1), ("b", 2)])
        await r.settle()
        await r.pull("b", 0)
        assert r.engine.landed == [("b", 0)] and list(r.encoder.pulls) == [("b", 1)]
        r.feed.consumed("b", 0)  # what the engine says when it has been recalled
        r.feed.withdrawn(["b"])
        r.feed.wanted([("a", 0), ("a", 1), ("b", 0), ("b", 1)])
        await r.settle()
        assert [key for key, pull in r.encoder.pulls.items() if not pull.cancelled()] == [
            ("a", 0),
            ("a", 1),
        ]
        for index in (0, 1):
            await r.pull("a", index)
            r.feed.consumed("a", index)
        await r.settle()
        for index in (0, 1):
            await r.pull("b", index)
        assert r.engine.landed[1:] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
        for name in "ab":
            r.feed.end(name)
        for index in (0, 1):
            r.feed.consumed("b", index)
        assert r.pool.used_nbytes == 0 and r.failed == {}


async def test_a_pull_that_ends_as_it_is_withdrawn_lands_once() -> None:
    async with rig(2) as r:
        r.feed.start("a", [item(0)])
        r.feed.wanted([("a", 0)])
        await r.settle()
        r.encoder.pulls.pop(("a", 0)).set_result(None)
        r.feed.withdrawn(["a"])
        r.feed.wanted([("a", 0)])
        await r.settle()
        assert r.engine.landed == [] and list(r.encoder.pulls) == [("a", 0)]
        await r.pull("a", 0)
        assert r.engine.landed == [("a", 0)]
        r.feed.end("a")
        r.feed.consumed("a", 0)
        assert r.pool.used_nbytes == 0


async def test_rows_land_before_they_are_proven() -> None:
    async with rig(2) as r:
        r.feed.start("a", [item(0), item(1)])
        r.feed.wanted([("a", 0), ("a", 1)])
        await r.settle()
        for index in (0, 1):
            await r.pull("a", index)
        assert r.engine.landed == [("a", 0), ("a", 1)] and r.engine.vouched == []
        r.feed.used(Used("a", 7, (0, 1)))  # a step was quicker than the answer
        r.encoder.copies["a", 1].known.set_result(None)
        await r.settle()
        assert r.engine.vouched == [("a", 1)] and r.engine.proven == []
        r.encoder.copies["a", 0].known.set_result(None)
        await r.settle()
        assert r.engine.vouched == [("a", 1), ("a", 0)] and r.engine.proven == [7]
        r.feed.end("a")
        for index in (0, 1):
            r.feed.consumed("a", index)
        assert r.pool.used_nbytes == 0 and r.failed == {}


async def test_rows_that_were_not_right_end_their_request() -> None:
    async with rig(2) as r:
        r.feed.start("a", [item(0), item(1)])
        r.feed.wanted([("a", 1)])
        await r.settle()
        await r.pull("a", 1)
        r.feed.used(Used("a", 1, (1,)))
        r.encoder.copies["a", 1].known.set_exception(TransferFailed("the lease expired"))
        await r.settle()
        failure = r.failed["a"]
        assert isinstance(failure, TransferFailed) and failure.item == 1
        assert r.engine.vouched == [] and r.engine.proven == []
        assert r.pool.used_nbytes == PAGE, "the engine may be reading them"
        r.feed.end("a")
        r.feed.consumed("a", 1)
        assert r.pool.used_nbytes == 0


async def test_what_is_given_back_unproven_is_asked_for_again() -> None:
    async with rig(1) as r:
        r.feed.start("a", [item(0)])
        r.feed.wanted([("a", 0)])
        await r.settle()
        await r.pull("a", 0)
        r.feed.consumed("a", 0)
        r.feed.withdrawn(["a"])
        r.feed.wanted([("a", 0)])
        await r.settle()
        assert r.encoder.copies["a", 0].released and r.failed == {} and r.engine.vouched == []
        await r.pull("a", 0)
        r.encoder.copies["a", 0].known.set_result(None)
        await r.settle()
        assert r.engine.landed == [("a", 0)] * 2 and r.engine.vouched == [("a", 0)]
        r.feed.end("a")
        r.feed.consumed("a", 0)


async def test_a_withdrawal_leaves_the_answer_of_what_has_landed_alone() -> None:
    """Its rows may be in use already."""
    async with rig(2) as r:
        r.feed.start("a", [item(0), item(1)])
        r.feed.wanted([("a", 0), ("a", 1)])
        await r.settle()
        await r.pull("a", 0)
        r.feed.withdrawn(["a"])
        r.encoder.copies["a", 0].known.set_result(None)
        await r.settle()
        assert r.engine.vouched == [("a", 0)] and r.failed == {}
        r.feed.end("a")
        r.feed.consumed("a", 0)


async def test_what_is_needless_is_declined_once_unless_it_was_claimed() -> None:
    async with rig(4) as r:
        r.feed.start("a", [item(0), item(1)])
        r.feed.wanted([("a", 1)])
        for _ in range(2):
            r.feed.needless([("a", 0), ("a", 1), ("nobody", 0)])
            await r.settle()
        assert r.encoder.declined == [("a", 0)]
        r.feed.end("a")


async def test_a_lease_that_is_gone_fails_its_request_by_name() -> None:
    async with rig(4) as r:
        r.feed.start("a", [item(0), item(1)])
        r.feed.wanted([("a", 0), ("a", 1)])
        await r.settle()
        r.encoder.pulls["a", 1].set_exception(SlotGone("slot 1 has expired"))
        await r.settle()
        failure = r.failed["a"]
        assert isinstance(failure, SlotGone) and failure.item == 1 and failure.retryable
        r.feed.end("a")
        await r.settle()
        assert r.pool.used_nbytes == 0


@pytest.mark.parametrize("again", [False, True])
async def test_an_end_stops_everything(again: bool) -> None:
    async with rig(1) as r:
        r.feed.start("a", [item(0), item(1)])
        r.feed.wanted([("a", 0), ("a", 1)])
        await r.settle()
        r.feed.end("a")
        if again:
            r.feed.end("a")
        r.feed.wanted([("a", 0)])
        r.feed.withdrawn(["a"])
        await r.settle()
        assert r.pool.used_nbytes == 0 and r.engine.landed == []
