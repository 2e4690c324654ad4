"""Blocks as sequences grow: who takes them, who gives them back, and that everybody goes on."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_scheduler import prompt, run, scheduler, shown
from triptych.engine.block_manager import BlockManager
from triptych.engine.overlap import Overlap
from triptych.engine.prefix import BlockNames
from triptych.engine.scheduler import Scheduler
from triptych.engine.sequence import Item, ItemSpan, Phase, Reservation, Rows, Sequence
from triptych.engine.work import Schedule, Work
from triptych.request import Sampling


def test_blocks_come_with_the_tokens() -> None:
    owner = scheduler(n_blocks=20, chunk=8)
    growing = prompt("a", 14, answer=6)
    owner.add(growing)
    seen = []
    while growing.phase is not Phase.ENDED:
        step = owner.schedule()
        seen.append(len(growing.blocks))
        run(step, owner)
    # 8 tokens, 14, then one more each; a block ahead as soon as the next token begins one.
    assert seen == [2, 4, 4, 5, 5, 5, 5]
    assert owner.blocks.n_free == 20


def test_the_youngest_gives_way_and_is_computed_again() -> None:
    owner = scheduler(n_blocks=6, chunk=20)
    old, young = prompt("old", 8, answer=10), prompt("young", 8, answer=10)
    owner.add(old)
    owner.add(young)
    preempted: list[Sequence] = []
    steps = []
    while old.phase is not Phase.ENDED:
        step = owner.schedule()
        preempted += step.preempted
        steps.append(shown(step))
        run(step, owner)
    assert preempted == [young]
    # Four of its tokens were there by then: with its prompt they are computed in one chunk.
    assert young.phase is Phase.QUEUED and young.output == [7] * 5
    assert (young.n_prompt, young.resumed, young.computed, young.blocks) == (13, 5, 0, ())
    assert steps[0] == [("old", 0, 8), ("young", 0, 8)]
    assert owner.blocks.n_free == 6
    step = owner.schedule()
    assert shown(step) == [("young", 0, 13)] and step.work[0].samples
    while young.phase is not Phase.ENDED:
        run(step, owner)
        step = owner.schedule()
    assert young.output == [7] * 10 and young.n_prompt == 13


def test_the_short_rest_of_a_prompt_takes_blocks_from_who_is_younger() -> None:
    """It goes first in a step as far as blocks are free, and in its turn like any other."""
    owner = scheduler(n_blocks=6, overlap="always")
    old = prompt("old", 13, items=(Item(12, 13, 1),))
    owner.add(old)
    while old.computed < 12:
        run(owner.schedule(), owner)
    owner.add(prompt("young", 4, answer=20))
    while owner.blocks.n_free:
        run(owner.schedule(), owner)
    old.items[0].where = Rows.LANDED
    for _ in range(8):  # the younger one computes until its last block is full
        step = owner.schedule()
        run(step, owner)
        if ("old", 12, 13) in shown(step):
            break
    assert old.computed == 13 and [entry.request_id for entry in owner.queue] == ["young"]


def test_a_preempted_sequence_is_before_all_that_came_later() -> None:
    owner = scheduler(n_blocks=6, chunk=20)
    for name in ("old", "young", "later"):
        owner.add(prompt(name, 8, answer=12))
    while not (step := owner.schedule()).preempted:
        run(step, owner)
    assert [entry.request_id for entry in owner.queue] == ["young", "later"]
    assert [name for name, *_ in shown(step)] == ["old"]


def test_what_is_kept_for_a_consumer_is_never_taken_away() -> None:
    """Nor is what it still needs: the consumer reads its first blocks while the last are computed,
    so that it can neither be stopped nor begun anew."""
    owner = scheduler(n_blocks=8, chunk=6, overlap="always")
    old = prompt("old", 4, answer=28)
    owner.add(old)
    run(owner.schedule(), owner)
    kept = prompt("kept", 20, keep_kv=True, items=(Item(6, 8, 2),))
    owner.add(kept)
    run(owner.schedule(), owner)
    held = kept.blocks
    assert kept.computed == 5 and held
    for _ in range(40):  # its image has not landed: all this time the answer waits for it
        step = owner.schedule()
        assert step.preempted == () and kept.blocks[: len(held)] == held
        run(step, owner)
    assert old.phase is Phase.DECODE and len(old.blocks) == 3 and old.computed == 12
    kept.items[0].where = Rows.LANDED
    while kept.phase is not Phase.KEPT:
        run(owner.schedule(), owner)
    assert owner.schedule().work == ()
    owner.end("kept")
    while old.phase is not Phase.ENDED:
        run(owner.schedule(), owner)


def test_a_reservation_is_granted_from_what_no_prompt_needs() -> None:
    owner = scheduler(n_blocks=8, chunk=4)
    owner.add(prompt("a", 15, answer=5))
    owner.add(Reservation("r", 20, 0.0))
    for _ in range(4):
        step = owner.schedule()
        assert step.granted == () and owner.blocks.n_free > 3
        run(step, owner)
    owner.end("a")
    (granted,) = owner.schedule().granted
    taking = prompt("r", 10, answer=10)
    taking.phase, taking.computed, taking.output, taking.reserved = Phase.DECODE, 10, [7], True
    owner.start(taking)
    owner.add(prompt("b", 4, answer=8))
    while taking.phase is not Phase.ENDED:
        step = owner.schedule()
        assert taking not in step.preempted and taking.blocks == granted.blocks
        run(step, owner)


def test_who_has_its_blocks_is_given_a_place() -> None:
    """Of one that may be waiting for these very blocks."""
    owner = scheduler(n_blocks=8, chunk=4, sequences=1)
    old = prompt("old", 4, answer=20)
    owner.add(old)
    run(owner.schedule(), owner)
    owner.add(Reservation("r", 20, 0.0))
    assert owner.schedule().granted
    taking = prompt("r", 10, answer=10)
    taking.phase, taking.computed, taking.output, taking.reserved = Phase.DECODE, 10, [7], True
    owner.start(taking)
    step = owner.schedule()
    assert step.preempted == (old,) and shown(step) == [("r", 10, 11)]
    for _ in range(60):
        run(step, owner)
        step = owner.schedule()
    assert old.phase is taking.phase is Phase.ENDED


def test_cancelling_whoever_was_preempted_leaves_nothing() -> None:
    owner = scheduler(n_blocks=6, chunk=20)
    owner.add(prompt("old", 8, answer=12))
    owner.add(prompt("young", 8, answer=12))
    while not (step := owner.schedule()).preempted:
        run(step, owner)
    owner.end("young")
    owner.end("old")
    assert owner.blocks.n_free == 6 and not owner.queue and not owner.running
    assert owner.schedule().work == ()


@pytest.mark.parametrize(("one", "stream"), [(40, 3), (3, 40)])
def test_nobody_starves_beside_a_stream_of_others(one: int, stream: int) -> None:
    """A long prompt beside short ones that never end coming, and the other way round."""
    owner = scheduler(n_blocks=14, chunk=8, sequences=4)
    number = 0

    def more() -> None:
        nonlocal number
        while len(owner.queue) < 6:
            number += 1
            owner.add(prompt(f"s{number}", stream, answer=6))

    more()
    for _ in range(3):
        run(owner.schedule(), owner)
    waiting = prompt("one", one, answer=6)
    owner.add(waiting)
    before = number
    for _ in range(400):
        more()
        run(owner.schedule(), owner)
        if waiting.phase is Phase.ENDED:
            break
    assert waiting.phase is Phase.ENDED
    assert number - before <= 30  # so many that came later were let in before its end


growing = st.tuples(
    st.integers(1, 30),  # prompt
    st.integers(1, 18),  # answer
    st.sampled_from(["language", "keep_kv", "decode"]),
    st.booleans(),  # has images
    st.integers(0, 30),  # turn at which it comes
    st.integers(0, 120),  # turn at which it is cancelled
    st.integers(0, 30),  # tokens that it has in common with others, its images included
)
ROW = 99
SPANS = (ItemSpan(2, None, key="cat"), ItemSpan(1, None, key="dog"))


class Machine:
    """What the engine does with a scheduler, without the model: its memory holds, instead of the
    KV of a token, all tokens up to it."""

    def __init__(
        self,
        n_blocks: int,
        chunk: int,
        places: int,
        *,
        names: bool,
        overlap: Overlap = "adaptive",
    ) -> None:
        self.owner = Scheduler(BlockManager(n_blocks, 4), chunk, places, overlap)
        self.known: dict[str, Sequence | Reservation] = {}
        self.lent: dict[str, tuple[int, ...]] = {}
        """Blocks that a consumer may be reading."""
        self.memory: dict[tuple[int, int], tuple[int, ...]] = {}
        self.ids: dict[str, tuple[int, ...]] = {}
        self.found = 0
        self._names = names

    def add(self, name: str, n: int, answer: int, kind: str, images: bool, common: int) -> None:
        own = 100 + int(name)
        ids = [2] * min(n, common) + [own] * max(0, n - common)
        if kind == "decode":
            self.known[name] = Reservation(name, n + answer, 0.0)
            self.ids[name] = (own,) * n
        else:
            items = (Item(1, 3, 2), Item(4, 5, 1)) if images and n > 4 else ()
            rows = [1, 2, 4] if items else []
            for row in rows:
                ids[row] = ROW
            sequence = prompt(name, n, answer, items, keep_kv=kind == "keep_kv")
            if self._names:
                sequence.names = BlockNames(ids, items, SPANS[: len(items)], rows, 4)
            self.known[name], self.ids[name] = sequence, tuple(ids)
        self.owner.add(self.known[name])

    def end(self, name: str) -> None:
        entry = self.known.pop(name, None)
        self.lent.pop(name, None)
        if isinstance(entry, Sequence) and entry.phase is not Phase.ENDED:
            entry.become(Phase.ENDED)
        self.owner.end(name)

    def turn(self, lands: bool) -> Schedule:
        step = self.owner.schedule()
        self.check(step)
        for granted in step.granted:
            self.take_over(granted)
        if lands:
            for entry in self.known.values():
                for item in entry.items if isinstance(entry, Sequence) else ():
                    item.where = Rows.LANDED if item.where is Rows.ASKED else item.where
        for work in step.work:
            self.compute(work)
        run(step, self.owner)
        for work in step.work:
            name, sequence = work.sequence.request_id, work.sequence
            if sequence.keep_kv:
                whole = sequence.phase is Phase.KEPT
                full = len(sequence.blocks) if whole else sequence.computed // 4
                self.lent[name] = sequence.blocks[:full]
            if sequence.phase is Phase.ENDED:
                self.known.pop(name, None)
        return step

    def compute(self, work: Work) -> None:
        sequence = work.sequence
        tokens = self.tokens(sequence)
        for position in range(work.start):
            assert self.memory[self.place(sequence, position)] == tokens[: position + 1]
        for position in range(work.start, work.stop):
            self.memory[self.place(sequence, position)] = tokens[: position + 1]
        for item in sequence.items:
            if item.stop <= work.stop and item.where is Rows.LANDED:
                item.where = Rows.USED
        self.owner.confirm(sequence, work.stop)

    def tokens(self, sequence: Sequence) -> tuple[int, ...]:
        return (*self.ids[sequence.request_id], *sequence.output)

    def place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.blocks[position // 4], position % 4

    def take_over(self, granted: Reservation) -> None:
        name = granted.request_id
        n_prompt = len(self.ids[name])
        answer = granted.n_tokens - n_prompt
        sequence = prompt(name, n_prompt, answer)
        sequence.phase, sequence.computed, sequence.output = Phase.DECODE, n_prompt, [7]
        sequence.reserved = True
        sequence.sampling = Sampling(max_tokens=answer + 1)
        sequence.n_tokens = granted.n_tokens + 1
        self.known[name] = sequence
        self.owner.start(sequence)
        for position in range(n_prompt):
            self.memory[self.place(sequence, position)] = self.ids[name][: position + 1]

    def check(self, step: Schedule) -> None:
        owner = self.owner
        assert sum(work.stop - work.start for work in step.work) <= owner.chunk_tokens
        assert len(owner.running) <= owner.places
        self.check_blocks()
        usage = owner.usage()
        assert sum(usage.values()) == owner.blocks.n_blocks and min(usage.values()) >= 0
        for name, blocks in self.lent.items():
            assert self.known[name].blocks[: len(blocks)] == blocks
        for work in step.work:
            sequence = work.sequence
            assert work.start == sequence.computed < work.stop <= len(sequence.blocks) * 4
            if not work.is_decode:
                assert work.stop <= sequence.ready_until
                assert owner.overlap != "off" or sequence.complete
            if sequence.keep_kv:
                assert work.start // 4 >= len(self.lent.get(sequence.request_id, ()))
        assert all(not s.blocks and s.phase is Phase.QUEUED for s in step.preempted)
        assert not any(s.keep_kv or s.reserved for s in step.preempted)
        self.found += sum(sequence.computed for sequence in step.begun)
        assert all(s.computed < s.n_prompt for s in step.begun)

    def check_blocks(self) -> None:
        """None in two hands unless all of them have it full and named, and none lost."""
        blocks = self.owner.blocks
        holders: Counter[int] = Counter()
        for entry in self.known.values():
            assert len(entry.blocks) == len(set(entry.blocks))
            holders.update(entry.blocks)
        assert len(holders) == blocks.n_blocks - blocks.n_free
        for block, count in holders.items():
            assert blocks._holders[block] == count
            assert count == 1 or block in blocks._names
        for entry in self.known.values():
            if isinstance(entry, Sequence) and entry.names is not None:
                full = set(entry.blocks[: entry.computed // 4])
                assert all(holders[b] == 1 for b in entry.blocks if b not in full)


Wanted = list[tuple[int, int, str, bool, int, int, int]]


def carry_out(machine: Machine, wanted: Wanted, *, cancels: bool) -> None:
    for turn in range(700):
        for number, (n, answer, kind, images, comes, goes, common) in enumerate(wanted):
            name = str(number)
            if turn == comes:
                machine.add(name, n, answer, kind, images, common)
            if cancels and turn == comes + goes:
                machine.end(name)
            entry = machine.known.get(name)
            if isinstance(entry, Sequence) and entry.phase is Phase.KEPT and turn % 3 == 0:
                machine.end(name)
        machine.turn(lands=turn % 2 == 0)
        if turn > 40 and not machine.known and not cancels:
            break
    assert not machine.known and not machine.owner.running and not machine.owner.queue
    assert machine.owner.blocks.n_free == machine.owner.blocks.n_blocks


@settings(deadline=None)  # some have many turns
@given(
    st.lists(growing, max_size=8),
    st.integers(2, 9),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["adaptive", "off", "always"]),
)
def test_no_block_in_two_hands_none_lost_and_everything_ends(
    wanted: Wanted, chunk: int, places: int, cancels: bool, names: bool, overlap: Overlap
) -> None:
    carry_out(Machine(13, chunk, places, names=names, overlap=overlap), wanted, cancels=cancels)


def test_what_was_computed_is_found_under_pressure() -> None:
    """So that the test above says something of what is found."""
    wanted: Wanted = [(20, 18, "language", True, n, 0, 18) for n in range(8)]
    machine = Machine(13, 8, 3, names=True)
    carry_out(machine, wanted, cancels=False)
    assert machine.found > 40
