"""What may be computed behind a step whose tokens are not known, decided without a model."""

from __future__ import annotations

import copy
from collections import Counter
from random import Random

import pytest

from tests.unit.test_scheduler import prompt, run, scheduler, shown
from triptych.engine.ahead import follow
from triptych.engine.overlap import PATIENCE
from triptych.engine.scheduler import Scheduler
from triptych.engine.sequence import Item, Phase, Reservation, Rows, Sequence, Trust
from triptych.engine.work import Schedule, Work


def decoding(owner: Scheduler, *entries: Sequence) -> Schedule:
    """The first step in which all of them decode, not carried out."""
    for entry in entries:
        owner.add(entry)
    while not entries or any(entry.phase is not Phase.DECODE for entry in entries):
        run(owner.schedule(), owner)
    return owner.schedule()


def ahead(owner: Scheduler, step: Schedule) -> list[tuple[str, int, int]]:
    behind = follow(step.work, owner)
    return shown(behind) if behind else []


def test_the_next_token_of_every_sequence() -> None:
    owner = scheduler()
    step = decoding(owner, prompt("a", 3), prompt("b", 3))
    assert shown(step) == [("a", 3, 4), ("b", 3, 4)]
    behind = follow(step.work, owner)
    assert behind and shown(behind) == [("a", 4, 5), ("b", 4, 5)]
    assert [w.ahead for w in (*step.work, *behind.work)] == [0, 0, 1, 1]
    run(step, owner)
    assert [w.ahead for w in behind.work] == [0, 0]


def test_it_has_blocks_for_what_it_computes() -> None:
    owner = scheduler()
    step = decoding(owner, prompt("a", 3, answer=30))
    [first] = step.work
    while (behind := follow(step.work, owner)) and behind.work[0].stop < 20:
        assert len(first.sequence.blocks) * owner.blocks.block_size >= behind.work[0].stop
        run(step, owner)
        step = behind
    assert behind and behind.work[0].stop == 20


def test_nothing_behind_the_end_of_a_prompt() -> None:
    owner = scheduler()
    owner.add(prompt("a", 3))
    assert ahead(owner, owner.schedule()) == []
    step = decoding(owner, prompt("b", 3))
    assert ahead(owner, step) != []
    owner.add(prompt("c", 3))
    run(step, owner)
    step = owner.schedule()
    assert [work.is_decode for work in step.work] == [True, True, False]
    assert ahead(owner, step) == []


def test_a_prompt_among_decodes_goes_on_with_them() -> None:
    owner = scheduler(chunk=16)
    step = decoding(owner, prompt("a", 3, answer=9), prompt("b", 5, answer=3))
    owner.add(prompt("c", 40))
    run(step, owner)
    step = owner.schedule()
    assert shown(step) == [("a", 4, 5), ("b", 6, 7), ("c", 0, 14)]
    behind = follow(step.work, owner)
    assert behind and shown(behind) == [("a", 5, 6), ("c", 14, 29)]
    assert [w.ahead for w in behind.work] == [1, 0]
    run(step, owner)
    assert shown(owner.schedule()) == shown(behind)


def test_the_oldest_prompt_goes_on_if_it_has_the_whole_step() -> None:
    owner = scheduler(chunk=16)
    owner.add(prompt("a", 40))
    owner.add(prompt("b", 40))
    step = owner.schedule()
    assert shown(step) == [("a", 0, 16)] and ahead(owner, step) == [("a", 16, 32)]
    run(step, owner)
    step = owner.schedule()
    assert ahead(owner, step) == [], "the rest of the step is the other's"
    run(step, owner)
    owner.add(prompt("c", 6))
    step = owner.schedule()
    assert shown(step) == [("c", 0, 6), ("a", 32, 38)]
    assert ahead(owner, step) == []


def test_the_next_chunk_of_a_prompt_that_is_computed_alone() -> None:
    owner = scheduler(chunk=8)
    a = prompt("a", 20, items=(Item(14, 16, 2),))
    owner.add(a)
    step = owner.schedule()
    assert shown(step) == [("a", 0, 8)]
    behind = follow(step.work, owner)
    assert behind and shown(behind) == [("a", 8, 14)] and behind.work[0].ahead == 0
    run(step, owner)
    assert ahead(owner, behind) == [], "the next row has not landed"
    a.items[0].where = Rows.LANDED
    last = follow(behind.work, owner)
    assert last and shown(last) == [("a", 14, 20)]
    run(behind, owner)
    assert ahead(owner, last) == [], "its token is not known"


def test_its_last_chunks_are_of_one_size_too() -> None:
    owner = scheduler(chunk=16)
    owner.add(prompt("a", 40))
    step = owner.schedule()
    assert shown(step) == [("a", 0, 16)] and ahead(owner, step) == [("a", 16, 28)]


def test_a_chunk_waits_for_whoever_has_come() -> None:
    owner = scheduler(chunk=8, sequences=2)
    owner.add(prompt("a", 30))
    step = owner.schedule()
    assert ahead(owner, step) == [("a", 8, 16)]
    owner.add(prompt("b", 3))
    assert ahead(owner, step) == [], "it is let in"
    run(step, owner)
    assert ahead(owner, owner.schedule()) == [], "both are computed"


@pytest.mark.parametrize("trust", Trust)
def test_no_chunk_behind_rows_that_may_be_taken_back(trust: Trust) -> None:
    owner = scheduler(chunk=8)
    owner.add(prompt("a", 30, items=(Item(2, 4, 2, Rows.LANDED, trust),)))
    assert (ahead(owner, owner.schedule()) == []) == (trust is Trust.BORROWED)


def test_no_chunk_of_a_prompt_that_has_ended() -> None:
    owner = scheduler(chunk=8)
    a = prompt("a", 30)
    owner.add(a)
    step = owner.schedule()
    a.become(Phase.ENDED)
    owner.end("a")
    assert ahead(owner, step) == []


def test_a_chunk_takes_blocks_from_nobody() -> None:
    owner = scheduler(n_blocks=8, chunk=8)
    owner.add(prompt("a", 20, keep_kv=True))
    step = owner.schedule()
    owner.blocks.grow("somebody", 6 * 4 - 3)
    assert ahead(owner, step) == []


def test_who_ends_with_the_step_is_not_in_the_next() -> None:
    owner = scheduler()
    step = decoding(owner, prompt("a", 3, answer=2), prompt("b", 3, answer=3))
    assert shown(step) == [("a", 3, 4), ("b", 3, 4)]
    assert ahead(owner, step) == [("b", 4, 5)]
    other = scheduler()
    assert ahead(other, decoding(other, prompt("a", 3, answer=2))) == []


def test_who_ended_meanwhile_is_not_either() -> None:
    owner = scheduler()
    a, b = prompt("a", 3, answer=9), prompt("b", 3, answer=9)
    step = decoding(owner, a, b)
    a.become(Phase.ENDED)
    owner.end("a")
    assert ahead(owner, step) == [("b", 4, 5)]
    b.become(Phase.ENDED)
    owner.end("b")
    assert ahead(owner, step) == []


def test_one_who_came_to_decode_meanwhile_is_waited_for() -> None:
    """Its first token was withheld, say, and has been proven right."""
    owner = scheduler()
    step = decoding(owner, prompt("a", 3, answer=9), prompt("b", 3, answer=9))
    assert ahead(owner, Schedule((), step.rows, (), (), step.work[:1])) == []


def test_a_prompt_that_waits_for_its_image_lets_it_pass_and_no_longer() -> None:
    owner = scheduler()
    item = Item(2, 4, 2)
    owner.add(prompt("b", 6, items=(item,)))
    run(owner.schedule(), owner)
    step = decoding(owner, prompt("a", 3, answer=9))
    assert [work.sequence.request_id for work in step.work] == ["a"]
    assert ahead(owner, step) == [("a", 4, 5)]
    item.where = Rows.LANDED
    assert ahead(owner, step) == []


def test_one_who_waits_for_images_sees_it_go_by() -> None:
    owner = scheduler(sequences=1)
    waiting = prompt("b", 6, items=(Item(0, 4, 4),))
    step = decoding(owner, prompt("a", 3, answer=9))
    owner.add(waiting)
    before = waiting.passed
    assert ahead(owner, step) != []
    assert waiting.passed == before + 1
    waiting.passed = PATIENCE * owner.chunk_tokens
    assert ahead(owner, step) != [], "it goes first now, but there is no place"


@pytest.mark.parametrize("sequences", [1, 2])
def test_who_could_be_let_in_is(sequences: int) -> None:
    owner = scheduler(sequences=sequences)
    step = decoding(owner, prompt("a", 3, answer=9))
    owner.add(prompt("b", 6))
    assert (ahead(owner, step) == []) == (sequences == 2)


def test_a_place_that_will_be_free_is_not_passed_by() -> None:
    owner = scheduler(sequences=2)
    step = decoding(owner, prompt("a", 3, answer=9), prompt("b", 3, answer=3))
    owner.add(prompt("c", 3))
    while len(step.work[1].sequence.output) < 2:
        run(step, owner)
        step = owner.schedule()
    assert len(step.work) == 2 and ahead(owner, step) == []
    owner.queue.clear()
    assert len(ahead(owner, step)) == 1


def test_reservations_and_those_who_take_them_over() -> None:
    owner = scheduler(n_blocks=8, sequences=1)
    step = decoding(owner, prompt("a", 3, answer=9))
    owner.add(Reservation("r", 8, 0.0))
    assert ahead(owner, step) == [], "there are blocks for it"
    owner.add(Reservation("large", 32, 0.0))
    run(step, owner)
    step = owner.schedule()
    assert [entry.request_id for entry in step.granted] == ["r"]
    assert ahead(owner, step) != [], "there are none for the large one"
    taken = Sequence("r", 4, 8, step.work[0].sequence.sampling, 0.0, phase=Phase.DECODE)
    taken.computed, taken.reserved, taken.output = 4, True, [7]
    owner.start(taken)
    assert ahead(owner, step) == [], "it takes the place of one that can be preempted"
    run(step, owner)
    step = owner.schedule()
    assert [w.sequence.request_id for w in step.work] == ["r"]
    other = Sequence("s", 4, 8, taken.sampling, 0.0, phase=Phase.DECODE)
    other.reserved = True
    owner.starting.append(other)
    assert ahead(owner, step) == [("r", 5, 6)], "the place is not to be had"


def test_images_of_those_who_wait_are_asked_for_meanwhile() -> None:
    owner = scheduler(sequences=1)
    step = decoding(owner, prompt("a", 3, answer=9))
    owner.add(prompt("b", 6, items=(Item(0, 4, 4),)))
    behind = follow(step.work, owner)
    assert behind
    assert [(entry.request_id, item) for entry, item in behind.rows.wanted] == [("b", 0)]
    run(step, owner)
    step = behind
    behind = follow(step.work, owner)
    assert behind and behind.rows.wanted == ()


def test_nobody_is_preempted_for_it() -> None:
    owner = scheduler(n_blocks=4)
    step = decoding(owner, prompt("a", 3, answer=9), prompt("b", 3, answer=9))
    while behind := follow(step.work, owner):
        run(step, owner)
        assert not step.preempted
        step = behind
    run(step, owner)
    step = owner.schedule()
    assert [sequence.request_id for sequence in step.preempted] == ["b"]
    assert ahead(owner, step) == [("a", 9, 10)], "the other waits for more than is free"


def finish(step: tuple[Work, ...], owner: Scheduler, random: Random) -> None:
    """As ``run``, for those who are still there; some end."""
    for work in step:
        sequence = work.sequence
        if sequence.phase is Phase.ENDED:
            continue
        sequence.computed = work.stop
        if not work.samples:
            continue
        finished = sequence.accept(7) or random.random() < 0.1
        if finished:
            sequence.become(Phase.ENDED)
            owner.end(sequence.request_id)
        elif sequence.phase is Phase.PREFILL:
            sequence.become(Phase.DECODE)


@pytest.mark.parametrize("seed", range(60))
def test_every_token_is_computed_once_in_its_own_blocks(seed: int) -> None:
    """As the engine goes about it: a step is launched behind one whose tokens come later."""
    random = Random(seed)
    owner = scheduler(
        n_blocks=random.choice([8, 12, 40]), chunk=random.choice([6, 16]), sequences=4
    )
    alive: dict[str, Sequence] = {}
    written: dict[str, Counter[int]] = {}
    launched: tuple[Work, ...] = ()
    n_ahead = 0

    def launch(work: tuple[Work, ...]) -> None:
        owners: dict[int, str] = {}
        for w in work:
            name = w.sequence.request_id
            assert len(w.sequence.blocks) * 4 >= w.stop
            for token in range(w.start, w.stop):
                block = w.sequence.blocks[token // 4]
                assert owners.setdefault(block, name) == name
                written[name][token] += 1

    for turn in range(120):
        if turn < 80 and random.random() < 0.2:
            name = f"r{turn}"
            alive[name] = prompt(name, random.randint(1, 12), answer=random.randint(1, 12))
            written[name] = Counter()
            owner.add(alive[name])
        if alive and random.random() < 0.05:
            cancelled = alive.pop(random.choice(sorted(alive)))
            if cancelled.phase is not Phase.ENDED:
                cancelled.become(Phase.ENDED)
                owner.end(cancelled.request_id)
        step = launched
        if not step:
            schedule = owner.schedule()
            for sequence in schedule.preempted:
                written[sequence.request_id].clear()
            step = schedule.work
            launch(step)
        behind = follow(step, owner)
        launched = behind.work if behind else ()
        launch(launched)
        n_ahead += len(launched)
        finish(step, owner, random)
        for sequence in owner.running:
            counts = written[sequence.request_id]
            assert all(counts[token] == 1 for token in range(sequence.computed))
    while launched or (launched := owner.schedule().work):
        step, behind = launched, follow(launched, owner)
        launched = behind.work if behind else ()
        finish(step, owner, random)
    assert n_ahead and all(each.phase is Phase.ENDED for each in alive.values())
    assert owner.blocks.n_free == owner.blocks.n_blocks


@pytest.mark.parametrize("seed", range(4))
def test_what_is_computed_ahead_is_what_would_be_scheduled(seed: int) -> None:
    """Where every answer goes on: prompts, some of whose images come late, among decodes."""
    random = Random(seed)
    kinds: Counter[str] = Counter()
    for _ in range(25):
        owner = scheduler(
            n_blocks=random.choice([30, 200]), chunk=random.choice([8, 16, 24]), sequences=6
        )
        for turn in range(150):
            if turn < 100 and random.random() < 0.15:
                items = (Item(4, 8, 4),) if random.random() < 0.3 else ()
                n = random.choice([9, 12, 60])
                owner.add(prompt(f"r{turn}", n, answer=random.randint(1, 20), items=items))
            for entry in (*owner.running, *owner.queue):
                assert isinstance(entry, Sequence)
                for item in entry.items:
                    if item.where is not Rows.USED and random.random() < 0.2:
                        item.where = Rows.LANDED
            step = owner.schedule()
            behind = follow(*copy.deepcopy((step.work, owner)))
            run(step, owner)
            if behind is not None:
                assert shown(behind) == shown(copy.deepcopy(owner).schedule())
                n_chunks = sum(not work.is_decode for work in behind.work)
                both = 0 < n_chunks < len(behind.work)
                kinds["both" if both else "chunk" if n_chunks else "decodes"] += 1
    assert min(kinds[kind] for kind in ("both", "chunk", "decodes")) > 20
