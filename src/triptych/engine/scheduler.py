"""What the next step computes. Plain data in and out: no torch, no clock, no I/O.

A sequence first waits in ``queue`` for a running place and for room, strictly in order of arrival,
so that a large one is never overtaken forever. There is room when its prompt, and all prompts that
run already, fit what is free: blocks are taken as a sequence grows, and only answers may want more
than there is. Then the youngest running sequence is *preempted*: it gives its blocks back, waits in
the queue, where it is before all that came later, and is computed again from its first token. So
the oldest always goes on, and everything ends.

A sequence that comes to run first takes what it finds of its prompt's KV: blocks that others have
computed, or it itself before it was preempted. At least one token is computed, since something has
to be sampled from. Images all of whose rows are in found blocks are not read.

Never preempted are a sequence that took over a reservation, which has its blocks from the start,
and one whose KV is kept for a consumer, who may be reading its first blocks while the last are
computed: they cannot be given to anybody else. What such a prompt still needs is nobody else's.
A reservation needs blocks only; the sequence that takes it over waits in ``starting`` for a place,
before anything that is still queued, and is given that of one that can be preempted.

A step takes one token of every decoding sequence, then chunks of prompts, in order of arrival and
up to their first row that has not landed. Half of the tokens for prompts go first to those that
they end, the shortest before the others: a few words do not wait for the images of all who came
before, and the oldest prompt has the other half. Nor do they wait for a whole step of their own:
one that begins and ends such a prompt has half of its tokens, or as many for the others as for
those. The last chunks of one that is alone are of one size. ``overlap`` says what becomes of
prompts some of whose images have not landed (``overlap.py``). There are never more running
sequences than tokens in a step: decodes leave room for a prompt.

A run, rows that a model computes as a whole, is never cut by a chunk: a chunk ends before a run
that does not fit, and decodes leave room for the longest one.
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections import Counter, deque
from operator import attrgetter

from triptych.engine.block_manager import BlockManager
from triptych.engine.overlap import Overlap, goes_first, is_worth
from triptych.engine.row_requests import RowRequests
from triptych.engine.sequence import Phase, Reservation, Sequence
from triptych.engine.work import Schedule, Work, evenly
from triptych.errors import PromptTooLong

READ_AHEAD = 8
"""Steps whose prompts may have their images brought before they run."""
_by_order = attrgetter("order")


class Scheduler:
    def __init__(
        self,
        blocks: BlockManager,
        chunk_tokens: int,
        max_sequences: int,
        overlap: Overlap = "adaptive",
        longest_run: int = 1,
    ) -> None:
        """``longest_run``: most tokens of a run, ``chunk_tokens`` at most."""
        self.blocks = blocks
        self.overlap = overlap
        self.chunk_tokens = chunk_tokens
        self.longest_run = longest_run
        self.places = min(max_sequences, chunk_tokens + 1 - longest_run)
        self.queue: list[Sequence | Reservation] = []
        """By ``order``, as ``running`` is."""
        self.reserved: dict[str, Reservation] = {}
        self.starting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._order = itertools.count(1)
        self._kept: dict[str, tuple[int, ...]] = {}
        """Blocks that are kept for consumers, by request."""
        self._leased: Counter[int] = Counter()
        """How many keep each of them."""
        self._preempted: list[Sequence] = []
        self._rows = RowRequests(READ_AHEAD * chunk_tokens, blocks.block_size)
        self._begun: list[Sequence] = []

    def add(self, entry: Sequence | Reservation) -> None:
        """Queue it. Raises PromptTooLong if it does not fit even an empty cache."""
        if not self.blocks.fits(entry.n_tokens):
            room = self.blocks.n_blocks * self.blocks.block_size
            raise PromptTooLong(f"{entry.n_tokens} tokens do not fit the KV cache of {room} tokens")
        entry.order = next(self._order)
        self.queue.append(entry)

    def start(self, sequence: Sequence) -> None:
        """A decoding sequence takes over the blocks of its granted reservation."""
        reservation = self.reserved.pop(sequence.request_id)
        sequence.blocks, sequence.order = reservation.blocks, reservation.order
        self.starting.append(sequence)

    def keep(self, sequence: Sequence) -> None:
        """Give up its running place; its blocks stay."""
        sequence.become(Phase.KEPT)
        self.running.remove(sequence)
        self._kept[sequence.request_id] = sequence.blocks
        self._leased.update(sequence.blocks)

    def confirm(self, sequence: Sequence, n_tokens: int) -> None:
        """The KV of its first ``n_tokens`` is there and proven right: others may find it."""
        if sequence.names is None or n_tokens // self.blocks.block_size <= sequence.named:
            return
        names = sequence.names.first(n_tokens)
        for number in range(sequence.named, len(names)):
            self.blocks.name(sequence.blocks[number], names[number])
        sequence.named = max(sequence.named, len(names))

    def cramped(self, request_id: str) -> None:
        """Its images will never be there all at once, so that it cannot wait for that."""
        for entry in self.queue:
            if isinstance(entry, Sequence) and entry.request_id == request_id:
                entry.cramped = True

    def end(self, request_id: str) -> None:
        """Forget the request, wherever it is, and free its blocks. Idempotent."""
        self.queue = [entry for entry in self.queue if entry.request_id != request_id]
        self.starting = deque(entry for entry in self.starting if entry.request_id != request_id)
        self.running = [entry for entry in self.running if entry.request_id != request_id]
        self.reserved.pop(request_id, None)
        self._leased.subtract(self._kept.pop(request_id, ()))
        self._leased = +self._leased
        self.blocks.release(request_id)

    def usage(self) -> dict[str, int]:
        """Blocks by what they are doing; together, all of them. ``leased``: kept for a consumer,
        whoever else computes with them; ``cached``: free, but may be found again."""
        reserved = sum(len(entry.blocks) for entry in self.reserved.values())
        leased = len(self._leased)
        free, cached = self.blocks.n_free - self.blocks.n_idle, self.blocks.n_idle
        pinned = self.blocks.n_blocks - free - cached - reserved - leased
        states = {"free": free, "cached": cached, "pinned": pinned}
        return states | {"reserved": reserved, "leased": leased}

    def schedule(self) -> Schedule:
        granted = self._admit()
        work = self._work()
        preempted, self._preempted = tuple(self._preempted), []
        begun, self._begun = tuple(self._begun), []
        rows = self._rows.ask(self.running, self.queue, self._find)
        return Schedule(preempted, rows, begun, granted, work)

    def goes_first(self, entry: Sequence | Reservation) -> bool:
        """It is complete, or like one that is."""
        return goes_first(entry, self.overlap, self.chunk_tokens)

    def worth(self, sequence: Sequence, start: int, stop: int, n_decodes: int) -> bool:
        """Would a step with so many decodes compute ``start .. stop`` of a prompt, given room?"""
        if self.goes_first(sequence):
            return stop > start
        return is_worth(sequence, start, stop, n_decodes, self.chunk_tokens)

    def computes(self, sequence: Sequence, n_decodes: int) -> bool:
        """Would a step with so many decodes compute something of this running one, given room?"""
        if sequence.phase is Phase.DECODE:
            return True
        ready = sequence.uncut(sequence.ready_until)
        return self.worth(sequence, sequence.computed, ready, n_decodes)

    def reaches(self, sequence: Sequence, start: int, budget: int) -> int:
        """Where a chunk of its prompt from ``start`` ends, of ``budget`` tokens at most."""
        complete = sequence.ready_until == sequence.n_prompt and not sequence.runs
        if complete and sum(s.phase is Phase.PREFILL for s in self.running) == 1:
            budget = evenly(sequence.n_prompt - start, budget, self.blocks.block_size)
        return sequence.uncut(min(sequence.ready_until, start + budget))

    def admits(self) -> bool:
        """Would ``schedule`` let in one of those who wait?"""
        if self.starting and (len(self.running) < self.places or self._others()):
            return True
        return self._next() is not None

    def extend(self, work: tuple[Work, ...]) -> Schedule | None:
        """A step of these, and of nothing else, with blocks that are free; None if there are not
        enough."""
        if not all(self._reach(w.sequence, w.stop, preempts=False) >= w.stop for w in work):
            return None
        self._pass_by(work)
        return Schedule((), self._rows.ask(self.running, self.queue, self._find), (), (), work)

    # ------------------------------------------------------------------ who runs

    def _admit(self) -> tuple[Reservation, ...]:
        granted: list[Reservation] = []
        while self.starting and self._has_place_for_reserved():
            insort(self.running, self.starting.popleft(), key=_by_order)
        while (entry := self._next()) is not None:
            self._enter(entry, granted)
        return tuple(granted)

    def _has_place_for_reserved(self) -> bool:
        """Who waits for a place with all its blocks does not wait for those who may want them."""
        if len(self.running) < self.places:
            return True
        others = self._others()
        if others:
            self._preempt(max(others, key=_by_order))
        return bool(others)

    def _others(self) -> list[Sequence]:
        """Those that may be preempted."""
        return [s for s in self.running if not (s.keep_kv or s.reserved)]

    def _next(self) -> Sequence | Reservation | None:
        """Who comes next from the queue, if there is room."""
        for entry in self.queue:
            if self.goes_first(entry):
                return entry if self._has_room(entry) else None
        if not self.queue or self.overlap != "adaptive":
            return None
        entry = self.queue[0]
        return entry if self._may_fill(entry) and self._has_room(entry) else None

    def _may_fill(self, entry: Sequence | Reservation) -> bool:
        """Would it, with its like, leave half of the cache to the others, if there are any?"""
        fill = [sequence for sequence in self.running if not self.goes_first(sequence)]
        if len(fill) == len(self.running):
            return True
        blocks = sum(len(e.blocks) + self._needs(e) for e in (*fill, entry))
        return 2 * blocks <= self.blocks.n_blocks

    def _has_room(self, entry: Sequence | Reservation) -> bool:
        """Is there a place, and are there blocks, beside what runs?"""
        if isinstance(entry, Sequence) and len(self.running) >= self.places:
            return False
        room = self.blocks.n_free - sum(self._needs(sequence) for sequence in self.running)
        found = self._find(entry) if isinstance(entry, Sequence) else ()
        return self._needs(entry) - len(found) + self.blocks.count_idle(found) <= room

    def _enter(self, entry: Sequence | Reservation, granted: list[Reservation]) -> None:
        """Let it run, or have its blocks."""
        self.queue.remove(entry)
        if isinstance(entry, Sequence):
            self._begin(entry)
            return
        blocks = self.blocks.grow(entry.request_id, entry.n_tokens)
        assert blocks is not None, "there was room"
        entry.blocks = blocks
        self.reserved[entry.request_id] = entry
        granted.append(entry)

    def _find(self, sequence: Sequence) -> tuple[int, ...]:
        """Blocks of its prompt's beginning that are there."""
        if sequence.names is None:
            return ()
        return self.blocks.find(sequence.names.each(sequence.n_prompt - 1))

    def _begin(self, sequence: Sequence) -> None:
        """Run it, behind the blocks that are found."""
        found = self._find(sequence)
        sequence.become(Phase.PREFILL)
        insort(self.running, sequence, key=_by_order)
        self._begun.append(sequence)
        sequence.foreseen = 0
        if not found:
            return
        self.blocks.share(sequence.request_id, found)
        sequence.blocks, sequence.named = found, len(found)
        sequence.computed = len(found) * self.blocks.block_size
        self._rows.found(sequence)

    def _needs(self, entry: Sequence | Reservation) -> int:
        """Blocks that it is still to be given without asking what others do: of a reservation all,
        of a sequence those up to its next sampled token, which is computed too if it goes on."""
        n_tokens = entry.n_tokens
        if isinstance(entry, Sequence):
            n_tokens = min(entry.n_prompt + 1, n_tokens)
        return max(0, self.blocks.blocks_for(n_tokens) - len(entry.blocks))

    # ------------------------------------------------------------------ what a step computes

    def _work(self) -> tuple[Work, ...]:
        decodes: list[Work] = []
        chunks: list[Work] = []
        budget = self.chunk_tokens - sum(s.phase is Phase.DECODE for s in self.running)
        first = [s for s in self.running if s.phase is Phase.DECODE or self.goes_first(s)]
        fill: list[Sequence] = []
        if self.overlap == "adaptive" and len(first) < len(self.running):
            fill = [s for s in self.running if s not in first]
        for sequence in self.short(first, budget):
            budget -= self._chunk(sequence, budget, chunks, preempts=False)
        chunked = [work.sequence for work in chunks]
        if any(sequence in self._begun for sequence in chunked):
            taken = sum(work.stop - work.start for work in chunks)
            budget = min(budget, max(taken, self.chunk_tokens // 2 - taken, self.longest_run))
        for sequence in (s for s in first if s not in chunked):
            if sequence.phase is Phase.DECODE:
                start = sequence.computed
                if self._reach(sequence, start + 1, preempts=True) > start:
                    decodes.append(Work(sequence, start, start + 1))
            elif sequence.phase is Phase.PREFILL:  # or preempted a moment ago
                budget -= self._chunk(sequence, budget, chunks, preempts=True)
        for sequence in fill:
            if sequence.phase is Phase.PREFILL and self.computes(sequence, len(decodes)):
                budget -= self._chunk(sequence, budget, chunks, preempts=False)
        for sequence in [work.sequence for work in decodes]:
            # One block ahead, so that the step after this can be planned while this one computes.
            self._reach(sequence, min(sequence.computed + 2, sequence.n_tokens), preempts=False)
        # A short prompt that went first may have lost its blocks to an older one since.
        work = (*decodes, *(w for w in chunks if w.sequence.phase is Phase.PREFILL))
        self._pass_by(work)
        return work

    def short(self, first: list[Sequence], budget: int) -> list[Sequence]:
        """Prompts that half of the step's tokens end, the shortest first. What is left is enough
        for any run, so that the oldest goes on in every step."""
        share = min(budget // 2, budget - self.longest_run)
        found = []
        prompts = [s for s in first if s.phase is Phase.PREFILL and s.ready_until == s.n_prompt]
        for sequence in sorted(prompts, key=attrgetter("left")):
            share -= sequence.left
            if share < 0:
                break
            found.append(sequence)
        return found

    def _pass_by(self, work: tuple[Work, ...]) -> None:
        """Incomplete prompts see it go by."""
        waiting = [
            entry
            for entry in (*self.running, *self.queue)
            if isinstance(entry, Sequence)
            and entry.phase is not Phase.DECODE
            and not self.goes_first(entry)
        ]
        if waiting:
            n_tokens = sum(w.stop - w.start for w in work if w.sequence not in waiting)
            for entry in waiting:
                entry.passed += n_tokens

    def _chunk(self, sequence: Sequence, budget: int, chunks: list[Work], *, preempts: bool) -> int:
        """Tokens of the chunk that was added, 0 if there is none."""
        start = sequence.computed
        stop = self.reaches(sequence, start, budget)
        if stop > start:
            stop = sequence.uncut(self._reach(sequence, stop, preempts=preempts))
        if stop > start:
            chunks.append(Work(sequence, start, stop))
        return max(0, stop - start)

    def _reach(self, sequence: Sequence, stop: int, *, preempts: bool) -> int:
        """Take blocks up to token ``stop``, from younger ones too if it ``preempts``; the token
        that there are blocks for, ``stop`` at most."""
        size = self.blocks.block_size
        if stop <= len(sequence.blocks) * size:
            return stop
        while (room := self._room(sequence) * size) < stop and preempts:
            victim = self._victim(sequence)
            if victim is None:
                break
            self._preempt(victim)
        stop = min(stop, room)
        if stop > len(sequence.blocks) * size:
            blocks = self.blocks.grow(sequence.request_id, stop)
            assert blocks is not None, "there was room"
            sequence.blocks = blocks
        return stop

    def _room(self, sequence: Sequence) -> int:
        """Blocks that the sequence has or could take, without what kept prompts still need."""
        held = len(sequence.blocks)
        if sequence.reserved:
            return held
        kept = sum(self._needs(s) for s in self.running if s.keep_kv and s is not sequence)
        return held + max(0, self.blocks.n_free - kept)

    def _victim(self, sequence: Sequence) -> Sequence | None:
        """Who gives its blocks up for it: the youngest of those that only fill, else of those
        that are younger."""
        others = [
            other
            for other in self.running
            if other is not sequence and other.blocks and not (other.keep_kv or other.reserved)
        ]
        fill = [s for s in others if s.phase is Phase.PREFILL and not self.goes_first(s)]
        younger = [other for other in others if other.order > sequence.order]
        return max(fill or younger, key=_by_order, default=None)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence.request_id)
        self._rows.give_up([sequence])
        sequence.preempt()
        self._rows.give_up(self.queue)
        insort(self.queue, sequence, key=_by_order)
        self._preempted.append(sequence)
