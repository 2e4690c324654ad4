"""Prompts whose images are still to come, beside those that have all they need."""

from __future__ import annotations

import pytest

from tests.unit.test_scheduler import prompt, run, scheduler, shown
from triptych.engine import overlap as rules
from triptych.engine.overlap import PATIENCE
from triptych.engine.scheduler import Scheduler
from triptych.engine.sequence import Item, Phase, Rows, Sequence


def partial(name: str, n: int = 12, first: int = 4, *, keep_kv: bool = False) -> Sequence:
    return prompt(name, n, items=(Item(first, first + 2, 2),), keep_kv=keep_kv)


def land(sequence: Sequence) -> None:
    for item in sequence.items:
        item.where = Rows.LANDED


def turn(owner: Scheduler) -> list[tuple[str, int, int]]:
    step = owner.schedule()
    seen = shown(step)
    run(step, owner)
    return seen


def test_always_is_first_come_first_served() -> None:
    owner = scheduler(overlap="always")
    owner.add(partial("a"))
    owner.add(prompt("b", 10))
    assert turn(owner) == [("a", 0, 4), ("b", 0, 4)]
    assert turn(owner) == [("b", 4, 10)]


def test_off_computes_nothing_before_all_is_there() -> None:
    owner = scheduler(overlap="off")
    first = partial("a")
    owner.add(first)
    owner.add(prompt("b", 3, answer=2))
    assert turn(owner) == [("b", 0, 3)]  # it passes who waits, in the queue
    assert first.phase is Phase.QUEUED and first.items[0].where is Rows.ASKED
    assert turn(owner) == [("b", 3, 4)]
    assert turn(owner) == []
    land(first)
    assert turn(owner) == [("a", 0, 8)]


def test_off_computes_what_never_is_there_all_at_once_as_it_lands() -> None:
    owner = scheduler(overlap="off")
    first = prompt("a", 12, items=(Item(2, 4, 2), Item(8, 10, 2)))
    owner.add(first)
    first.items[0].where = Rows.LANDED
    assert turn(owner) == []
    for name in ("a", "nobody"):
        owner.cramped(name)
    owner.add(prompt("b", 3, answer=2))
    assert turn(owner) == [("b", 0, 3), ("a", 0, 3)]
    assert turn(owner) == [("b", 3, 4), ("a", 3, 8)]
    first.items[0].where, first.items[1].where = Rows.USED, Rows.LANDED
    assert turn(owner) == [("a", 8, 12)]


def test_adaptive_lets_others_pass_whoever_is_cramped() -> None:
    owner = scheduler(overlap="adaptive", chunk=10)
    owner.add(partial("a", first=6))
    owner.cramped("a")
    owner.add(prompt("b", 8))
    assert turn(owner) == [("b", 0, 8), ("a", 0, 2)]


def test_adaptive_fills_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "WORTH", 1)
    owner = scheduler(overlap="adaptive", chunk=10)
    first = partial("a", first=6)
    owner.add(first)
    owner.add(prompt("b", 8))
    assert turn(owner) == [("b", 0, 8), ("a", 0, 2)]
    owner.add(prompt("c", 9))
    assert turn(owner) == [("b", 8, 9), ("c", 0, 9)]
    assert turn(owner) == [("b", 9, 10), ("c", 9, 10), ("a", 2, 6)]
    land(first)
    owner.add(prompt("d", 8))
    # Complete, it is the oldest of those that are.
    assert turn(owner)[2:] == [("a", 6, 12), ("d", 0, 2)]


def test_adaptive_fills_where_it_is_worth_the_time_of_those_who_decode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rules, "WORTH", 3)
    owner = scheduler(overlap="adaptive", n_blocks=30, chunk=20)
    first = partial("a", n=14, first=5)
    for name, answer in (("b", 3), ("c", 5)):
        owner.add(prompt(name, 4, answer=answer))
    assert turn(owner) == [("b", 0, 4), ("c", 0, 4)]
    owner.add(first)
    # Five tokens for two that decode are not enough, for the one that is left they are.
    assert turn(owner) == [("b", 4, 5), ("c", 4, 5)]
    assert turn(owner) == [("b", 5, 6), ("c", 5, 6)]
    assert turn(owner) == [("c", 6, 7), ("a", 0, 5)]
    # Complete, it waits for nobody.
    land(first)
    assert turn(owner) == [("c", 7, 8), ("a", 5, 14)]
    # Where nobody decodes, a single row is worth it.
    lone = scheduler(overlap="adaptive", chunk=20)
    rows = prompt("d", 9, items=(Item(0, 1, 1), Item(4, 6, 2)))
    lone.add(rows)
    rows.items[0].where = Rows.LANDED
    assert turn(lone) == [("d", 0, 4)]


def test_a_few_words_before_an_image_do_not_make_it_wait_for_a_step() -> None:
    owner = scheduler(overlap="adaptive", n_blocks=30, chunk=32)
    few, more = partial("a", n=8, first=3), partial("b", n=8, first=4)
    owner.add(few)
    assert turn(owner) == [] and few.items[0].where is Rows.ASKED
    owner.add(more)
    assert turn(owner) == [("b", 0, 4)]  # an eighth of a step
    land(few)
    assert turn(owner) == [("a", 0, 8)]


def test_adaptive_gives_places_and_room_to_complete_prompts_first() -> None:
    owner = scheduler(overlap="adaptive", n_blocks=10, chunk=8, sequences=2)
    waiting = [partial(name) for name in "abc"]
    for sequence in waiting:
        owner.add(sequence)
    owner.add(prompt("d", 4, answer=2))
    assert turn(owner) == [("d", 0, 4), ("a", 0, 4)]
    assert waiting[1].phase is Phase.QUEUED  # there is no place
    assert turn(owner) == [("d", 4, 5)]
    owner.add(prompt("e", 4, answer=2))
    assert turn(owner) == [("e", 0, 4)]


def test_incomplete_prompts_leave_half_of_the_cache_to_others() -> None:
    owner = scheduler(overlap="adaptive", n_blocks=16, chunk=20, sequences=9)
    for name in "abc":
        owner.add(partial(name, keep_kv=True))  # three blocks each
    owner.add(prompt("d", 4, answer=8))
    assert sorted(name for name, *_ in turn(owner)) == ["a", "b", "d"]
    owner.add(prompt("e", 28, answer=2))
    assert ("e", 0, 19) in turn(owner)


def test_whoever_was_passed_for_long_is_passed_no_more() -> None:
    owner = scheduler(overlap="adaptive", n_blocks=30, chunk=8, sequences=2)
    large = prompt("large", 60, items=tuple(Item(n, n + 2, 2) for n in range(2, 50, 10)))
    owner.add(large)
    number = passed = 0
    for _ in range(400):
        while len(owner.queue) < 4:
            number += 1
            owner.add(prompt(f"s{number}", 16, answer=2))
        step = owner.schedule()
        # Its images land one at a time, each when the one before it was used, as in small memory.
        item = next((i for i in large.items if i.where is not Rows.USED), None)
        if item is not None and item.where is Rows.ASKED:
            item.where = Rows.LANDED
        for work in step.work:
            if work.sequence is large:
                for each in large.items:
                    each.where = Rows.USED if each.stop <= work.stop else each.where
        passed += sum(w.stop - w.start for w in step.work if w.sequence is not large)
        run(step, owner)
        if large.phase is Phase.ENDED:
            break
    assert large.phase is Phase.ENDED and passed < 2 * PATIENCE * 8


def test_an_incomplete_prompt_gives_its_blocks_to_those_that_are_complete() -> None:
    """Younger ones too; when they have ended it fills again."""
    owner = scheduler(overlap="adaptive", n_blocks=8, chunk=8)
    old = partial("old", n=20, first=15)
    owner.add(old)
    assert turn(owner) == [("old", 0, 8)]
    young = prompt("young", 7, answer=20)
    owner.add(young)
    preempted = []
    for _ in range(40):
        step = owner.schedule()
        preempted += step.preempted
        run(step, owner)
    assert young.phase is Phase.ENDED and preempted == [old]
    assert old.computed == 15
