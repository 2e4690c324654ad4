"""The scheduler, alone: what a step computes, who waits, and that nobody waits forever."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.engine import overlap as rules
from triptych.engine.block_manager import BlockManager
from triptych.engine.overlap import Overlap
from triptych.engine.scheduler import Scheduler
from triptych.engine.sequence import (
    Item,
    ItemSpan,
    Phase,
    Reservation,
    Rows,
    Sequence,
    locate_items,
)
from triptych.engine.work import Schedule
from triptych.errors import BadRequest, PromptTooLong
from triptych.request import Sampling


def prompt(
    name: str, n: int, answer: int = 4, items: tuple[Item, ...] = (), keep_kv: bool = False
) -> Sequence:
    n_tokens = n if keep_kv else n + answer
    return Sequence(name, n, n_tokens, Sampling(max_tokens=answer), 0.0, items, keep_kv)


def scheduler(
    n_blocks: int = 100, chunk: int = 8, sequences: int = 4, overlap: Overlap = "adaptive"
) -> Scheduler:
    return Scheduler(BlockManager(n_blocks, 4), chunk, sequences, overlap)


def run(step: Schedule, owner: Scheduler) -> None:
    """What the engine does with a step, without the model: every token is 7."""
    for work in step.work:
        sequence = work.sequence
        sequence.computed = work.stop
        if not work.samples:
            continue
        finish = sequence.accept(7)
        if sequence.keep_kv:
            owner.keep(sequence)
        elif finish:
            sequence.become(Phase.ENDED)
            owner.end(sequence.request_id)
        elif sequence.phase is Phase.PREFILL:
            sequence.become(Phase.DECODE)


def usage(owner: Scheduler) -> dict[str, int]:
    return {state: n for state, n in owner.usage().items() if n}


def shown(step: Schedule) -> list[tuple[str, int, int]]:
    return [(work.sequence.request_id, work.start, work.stop) for work in step.work]


def test_a_long_prompt_is_cut_into_chunks_and_shares_steps_with_decodes() -> None:
    owner = scheduler()
    owner.add(prompt("a", 3, answer=3))
    owner.add(prompt("b", 12))
    seen = []
    for _ in range(3):
        step = owner.schedule()
        seen.append(shown(step))
        run(step, owner)
    assert seen == [
        [("a", 0, 3), ("b", 0, 3)],
        [("a", 3, 4), ("b", 3, 10)],
        [("a", 4, 5), ("b", 10, 12)],
    ]


def chunks(owner: Scheduler, name: str) -> list[int]:
    """Sizes of the prompt's, once all is done."""
    found = []
    while owner.running or owner.queue:
        step = owner.schedule()
        found += [
            work.stop - work.start
            for work in step.work
            if work.sequence.request_id == name and not work.is_decode
        ]
        run(step, owner)
    return found


def test_the_last_chunks_of_a_prompt_that_is_alone_are_of_one_size() -> None:
    owner = scheduler(chunk=16)
    owner.add(prompt("a", 40))
    assert chunks(owner, "a") == [16, 12, 12]  # multiples of a block
    owner.add(prompt("a", 18))
    assert chunks(owner, "a") == [12, 6]
    owner.add(prompt("a", 16))
    assert chunks(owner, "a") == [16]


def test_chunks_are_full_while_others_wait_or_more_is_to_come() -> None:
    owner = scheduler(chunk=16)
    owner.add(prompt("a", 18))
    owner.add(prompt("b", 18))
    assert shown(owner.schedule()) == [("a", 0, 16)]
    owner = scheduler(chunk=16)
    images = prompt("c", 30, items=(Item(24, 26, 2),))
    owner.add(images)
    step = owner.schedule()
    assert shown(step) == [("c", 0, 16)]
    run(step, owner)
    images.items[0].where = Rows.LANDED
    assert shown(owner.schedule()) == [("c", 16, 30)]
    owner = Scheduler(BlockManager(100, 4), 16, 4, longest_run=14)
    whole = prompt("d", 18)
    whole.runs = ((2, 16),)  # would be cut by a chunk of half
    owner.add(whole)
    assert shown(owner.schedule()) == [("d", 0, 16)]


def test_short_prompts_have_half_of_a_step_and_the_oldest_the_rest() -> None:
    owner = scheduler(chunk=10, sequences=9)
    owner.add(prompt("long", 40))
    run(owner.schedule(), owner)
    for name, n in (("late", 6), ("b", 3), ("a", 2)):
        owner.add(prompt(name, n, answer=1))
    step = owner.schedule()
    assert shown(step) == [("a", 0, 2), ("b", 0, 3), ("long", 10, 15)]
    run(step, owner)
    step = owner.schedule()  # six tokens are more than half, and wait for the older
    assert shown(step) == [("long", 15, 25)]
    run(step, owner)
    owner.add(prompt("c", 5, answer=1))
    assert shown(owner.schedule()) == [("c", 0, 5), ("long", 25, 30)]


def test_a_stream_of_short_prompts_takes_no_more_than_half() -> None:
    owner = scheduler(chunk=10, sequences=9)
    long = prompt("long", 60)
    owner.add(long)
    turn = 0
    while long.phase is not Phase.DECODE:
        turn += 1
        assert turn <= 60 / 4
        for number in range(4):
            owner.add(prompt(f"{turn}.{number}", 2, answer=1))
        step = owner.schedule()
        sizes = {w.sequence.request_id: w.stop - w.start for w in step.work}
        left = long.n_prompt - long.computed
        assert sizes.pop("long") >= min(sum(sizes.values()), left)
        run(step, owner)


def test_a_step_that_begins_and_ends_a_prompt_has_half_of_its_tokens() -> None:
    owner = scheduler(chunk=16, sequences=9)
    owner.add(prompt("long", 90))
    run(owner.schedule(), owner)
    owner.add(prompt("a", 3, answer=1))
    step = owner.schedule()
    assert shown(step) == [("a", 0, 3), ("long", 16, 21)]
    run(step, owner)
    for name, n in (("b", 4), ("c", 5)):
        owner.add(prompt(name, n, answer=1))
    step = owner.schedule()  # c is more than what b leaves of half of a step
    assert shown(step) == [("b", 0, 4), ("long", 21, 25)]
    run(step, owner)
    step = owner.schedule()  # c waits no longer for being computed with others
    assert shown(step) == [("c", 0, 5), ("long", 25, 36)]


def test_a_short_prompt_that_goes_first_leaves_room_for_a_run() -> None:
    owner = Scheduler(BlockManager(100, 4), 10, 9, longest_run=8)
    long = prompt("long", 16)
    long.runs = ((0, 8), (8, 16))
    owner.add(long)
    owner.add(prompt("a", 3, answer=1))
    step = owner.schedule()
    assert shown(step) == [("long", 0, 8), ("a", 0, 2)]
    run(step, owner)
    owner.add(prompt("b", 2, answer=1))
    assert shown(owner.schedule()) == [("a", 2, 3), ("long", 8, 16), ("b", 0, 1)]


def test_an_older_prompt_takes_back_what_a_short_one_was_given_in_the_same_step() -> None:
    owner = scheduler(n_blocks=5, chunk=24)
    old = prompt("old", 11, answer=9)
    owner.add(old)
    for _ in range(5):
        run(owner.schedule(), owner)
    assert old.computed == 15
    owner.add(prompt("a", 3, answer=1))
    run(owner.schedule(), owner)
    late = prompt("b", 3, answer=1)
    owner.add(late)
    step = owner.schedule()
    assert shown(step) == [("old", 16, 17)]
    assert step.preempted == (late,)


def test_complete_prompts_first_partial_ones_fill_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rules, "WORTH", 1)
    owner = scheduler()
    partial = prompt("a", 10, items=(Item(4, 6, 2),))
    owner.add(partial)
    owner.add(prompt("b", 5))
    step = owner.schedule()
    assert shown(step) == [("b", 0, 5), ("a", 0, 3)]
    run(step, owner)
    step = owner.schedule()
    assert shown(step) == [("b", 5, 6), ("a", 3, 4)]
    run(step, owner)
    assert shown(owner.schedule()) == [("b", 6, 7)]
    partial.items[0].where = Rows.LANDED
    assert shown(owner.schedule()) == [("b", 6, 7), ("a", 4, 10)]


def test_a_chunk_stops_before_the_first_row_that_has_not_landed() -> None:
    owner = scheduler(chunk=16)
    items = (Item(2, 4, 2), Item(6, 8, 2))
    owner.add(prompt("a", 10, items=items))
    items[1].where = Rows.LANDED
    step = owner.schedule()
    assert shown(step) == [("a", 0, 2)]
    run(step, owner)
    assert shown(owner.schedule()) == []
    items[0].where = Rows.LANDED
    assert shown(owner.schedule()) == [("a", 2, 10)]


def test_nobody_overtakes_the_head_of_the_queue() -> None:
    owner = scheduler(n_blocks=4)
    owner.add(prompt("a", 6, answer=2))
    owner.add(prompt("large", 12, answer=4))
    owner.add(prompt("small", 1, answer=1))
    assert shown(owner.schedule()) == [("a", 0, 6)]
    owner.end("a")
    assert [name for name, *_ in shown(owner.schedule())] == ["large"]


def test_a_prompt_waits_for_a_running_place() -> None:
    owner = scheduler(sequences=1)
    owner.add(prompt("a", 2))
    owner.add(prompt("b", 2))
    assert shown(owner.schedule()) == [("a", 0, 2)]
    owner.end("a")
    assert shown(owner.schedule()) == [("b", 0, 2)]


def test_decodes_never_take_the_whole_step() -> None:
    owner = scheduler(chunk=2, sequences=100)
    for name in "abc":
        owner.add(prompt(name, 2, answer=3))
    ended = 0
    for _ in range(12):
        step = owner.schedule()
        assert sum(w.stop - w.start for w in step.work) <= 2
        run(step, owner)
        ended = 3 - len(owner.running) - len(owner.queue)
    assert ended == 3


def test_kept_blocks_stay_until_the_end() -> None:
    owner = scheduler(n_blocks=2)
    kept = prompt("a", 8, keep_kv=True)
    owner.add(kept)
    run(owner.schedule(), owner)
    assert kept.phase is Phase.KEPT and owner.blocks.n_free == 0
    owner.add(prompt("b", 1, answer=1))
    assert shown(owner.schedule()) == []
    owner.end("a")
    owner.end("a")
    assert shown(owner.schedule()) == [("b", 0, 1)]


def test_reservations_wait_in_line_and_become_sequences() -> None:
    owner = scheduler(n_blocks=4, sequences=1)
    first, second = Reservation("a", 12, 0.0), Reservation("b", 8, 0.0)
    owner.add(first)
    owner.add(second)
    assert owner.schedule().granted == (first,)
    assert first.blocks == (0, 1, 2) and second.blocks == ()
    running = prompt("a", 10, answer=2)
    running.phase, running.computed, running.output = Phase.DECODE, 10, [7]
    owner.start(running)
    assert shown(owner.schedule()) == [("a", 10, 11)]
    assert running.blocks == first.blocks
    owner.end("a")
    assert owner.schedule().granted == (second,)
    owner.end("b")
    assert owner.blocks.n_free == 4


def test_blocks_by_what_they_are_doing() -> None:
    owner = scheduler(n_blocks=10)
    assert usage(owner) == {"free": 10}
    owner.add(prompt("kept", 8, keep_kv=True))
    owner.add(Reservation("a", 12, 0.0))
    owner.add(prompt("running", 12))
    owner.add(prompt("no room", 12))
    step = owner.schedule()
    assert usage(owner) == {"free": 5, "pinned": 2, "reserved": 3}
    run(step, owner)
    assert usage(owner) == {"free": 5, "reserved": 3, "leased": 2}
    run(owner.schedule(), owner)
    assert usage(owner) == {"free": 3, "pinned": 2, "reserved": 3, "leased": 2}
    starting = prompt("a", 10, answer=2)
    starting.phase, starting.computed, starting.output = Phase.DECODE, 10, [7]
    owner.start(starting)
    assert usage(owner) == {"free": 3, "pinned": 5, "leased": 2}
    for name in ("kept", "a", "running", "no room"):
        owner.end(name)
    assert usage(owner) == {"free": 10}


def test_what_never_fits_is_refused_at_once() -> None:
    owner = scheduler(n_blocks=2)
    with pytest.raises(PromptTooLong, match="9 tokens do not fit the KV cache of 8"):
        owner.add(Reservation("a", 9, 0.0))
    assert not owner.queue


def test_illegal_transitions_raise_and_change_nothing() -> None:
    sequence = prompt("a", 1)
    with pytest.raises(AssertionError):
        sequence.become(Phase.DECODE)
    assert sequence.phase is Phase.QUEUED


def test_items_are_located_by_their_rows() -> None:
    image, video = 9, 8
    row_tokens = {image, video}
    prompt = [1, 9, 9, 2, 9, 3, 8, 4, 8]
    spans = [ItemSpan(3, None), ItemSpan(2, None, "video")]
    items, rows = locate_items(prompt, row_tokens, spans)
    assert [(item.start, item.stop) for item in items] == [(1, 5), (6, 9)]
    assert rows == [1, 2, 4, 6, 8]
    for wrong in ([ItemSpan(4, None)], [ItemSpan(5, None), ItemSpan(0, None)], []):
        with pytest.raises(BadRequest, match="5 tokens for rows"):
            locate_items(prompt, row_tokens, wrong)


requests = st.tuples(
    st.integers(1, 30),  # prompt
    st.integers(1, 6),  # answer
    st.booleans(),  # keep_kv
    st.integers(0, 40),  # turn at which its image lands; an image if the prompt has 3 tokens
    st.integers(0, 200),  # turn at which it is cancelled
)


@settings(deadline=None)  # some have many turns
@given(st.lists(requests, max_size=8), st.integers(1, 9), st.integers(1, 5))
def test_everything_ends_within_the_limits(
    wanted: list[tuple[int, int, bool, int, int]], chunk: int, places: int
) -> None:
    owner = Scheduler(BlockManager(12, 4), chunk, places)
    sequences = []
    for number, (n, answer, keep_kv, _, _) in enumerate(wanted):
        items = (Item(1, 3, 2),) if n >= 3 else ()
        sequences.append(prompt(str(number), n, answer, items, keep_kv))
        owner.add(sequences[-1])
    started: list[str] = []
    for turn in range(400):
        for sequence, (_, _, _, lands, cancelled) in zip(sequences, wanted, strict=True):
            if turn == lands:
                for item in sequence.items:
                    item.where = Rows.LANDED
            if turn == cancelled or (sequence.phase is Phase.KEPT and turn % 3 == 0):
                owner.end(sequence.request_id)
        step = owner.schedule()
        assert sum(work.stop - work.start for work in step.work) <= chunk
        assert len(owner.running) <= places
        usage = owner.usage()
        assert sum(usage.values()) == 12 and min(usage.values()) >= 0
        for work in step.work:
            sequence = work.sequence
            assert work.start == sequence.computed < work.stop
            assert work.stop <= sequence.ready_until or work.is_decode
            assert work.stop <= len(sequence.blocks) * 4
            if work.start == 0 and not sequence.output:
                started.append(sequence.request_id)
        run(step, owner)
    assert not owner.queue and not owner.running
    assert owner.blocks.n_free == 12
    whole = [name for name in dict.fromkeys(started) if not sequences[int(name)].items]
    for n in {sequences[int(name)].n_prompt for name in whole}:
        like = [name for name in whole if sequences[int(name)].n_prompt == n]
        assert like == sorted(like, key=int), "of equal ones the older starts first"
