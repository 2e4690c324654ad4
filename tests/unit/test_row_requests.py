"""Images that the engine asks for, and those that it gives up, as the scheduler goes on."""

from __future__ import annotations

from tests.unit.test_scheduler import prompt, run, scheduler
from triptych.engine.prefix import BlockNames
from triptych.engine.sequence import Item, ItemSpan, Phase, Rows, Sequence, Trust
from triptych.engine.work import Schedule


def land(step: Schedule) -> None:
    """Everything that was asked for is here at once."""
    for sequence, item in step.rows.wanted:
        sequence.items[item].where = Rows.LANDED


def test_images_are_asked_for_when_a_prompt_runs_or_soon_may() -> None:
    owner = scheduler(n_blocks=100, chunk=4, sequences=1)
    for name in ("a", "b", "c", "d"):
        owner.add(prompt(name, 14, items=(Item(2, 4, 2), Item(5, 9, 4))))
    step = owner.schedule()  # eight steps of four tokens
    asked = [(sequence.request_id, item) for sequence, item in step.rows.wanted]
    assert asked == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0), ("c", 1)]
    assert owner.schedule().rows.wanted == ()
    owner.end("a")
    assert [(s.request_id, i) for s, i in owner.schedule().rows.wanted] == [("d", 0), ("d", 1)]


def test_rows_are_given_back_and_asked_for_again() -> None:
    owner = scheduler(n_blocks=6, chunk=20)
    old = prompt("old", 8, answer=12)
    young = prompt("young", 8, answer=12, items=(Item(2, 4, 2), Item(5, 6, 1)))
    ahead = prompt("ahead", 8, items=(Item(1, 3, 2), Item(3, 5, 2), Item(5, 7, 2)))
    for sequence in (old, young, ahead):
        owner.add(sequence)
    land(owner.schedule())
    ahead.items[0].trust = Trust.BORROWED
    ahead.items[2].where = Rows.ASKED  # on its way
    while not (step := owner.schedule()).preempted:
        run(step, owner)
        for item in young.items:
            item.where = Rows.USED
    # What lies in the producer's memory stays: it takes no room that others wait for.
    assert step.rows.returned == ((ahead, 1),)
    assert step.rows.withdrawn == (ahead,)
    assert step.rows.wanted == ((young, 0), (young, 1), (ahead, 1), (ahead, 2))
    assert ahead.items[0].where is Rows.LANDED
    assert young.ready_until == 2


def test_whoever_runs_is_brought_its_rows_before_those_who_wait() -> None:
    """KV that was there when its images were first asked for is gone when it begins."""
    owner = scheduler(n_blocks=6, chunk=20, sequences=1)
    ids = [1, 99, 99, 2, 3, 4, 5, 6, 7]

    def chat(name: str) -> Sequence:
        sequence = prompt(name, 9, answer=4, items=(Item(1, 3, 2),))
        spans = (ItemSpan(2, None, key="cat"),)
        sequence.names = BlockNames(ids, sequence.items, spans, [1, 2], 4)
        return sequence

    first, second = chat("first"), chat("second")
    other = prompt("other", 14, answer=8)
    behind = prompt("behind", 9, items=(Item(2, 4, 2),))
    owner.add(first)
    land(owner.schedule())
    while first.phase is not Phase.ENDED:
        step = owner.schedule()
        run(step, owner)
        for work in step.work:
            owner.confirm(first, work.stop) if first.phase is not Phase.ENDED else None
    for sequence in (other, second, behind):
        owner.add(sequence)
    step = owner.schedule()
    assert step.rows.wanted == ((behind, 0),) and second.foreseen == 8
    behind.items[0].where = Rows.LANDED
    while other.phase is not Phase.ENDED:
        run(owner.schedule(), owner)
    step = owner.schedule()
    assert step.begun == (second,) and second.computed == 0
    assert step.rows.returned == ((behind, 0),)
    assert step.rows.wanted == ((second, 0), (behind, 0))
