"""What the next step computes. Plain data in and out: no torch, no clock, no I/O.

A sequence first waits in ``queue`` for its blocks and a running place, strictly in order of
arrival, so that a large one is never overtaken forever. It is given all blocks it will ever need
at once; nothing is preempted. A reservation needs blocks only; the sequence that takes it over
waits in ``starting`` for a place, before anything that is still queued.

A step takes one token of every decoding sequence, then chunks of prompts. Prompts whose images
have all landed go first; the others fill what is left, up to their first row that has not landed.
There are never more running sequences than tokens in a step: decodes leave room for a prompt.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from triptych.engine.block_manager import BlockManager
from triptych.engine.sequence import Phase, Reservation, Sequence
from triptych.errors import PromptTooLong


@dataclass(frozen=True, slots=True)
class Work:
    """Compute the KV of tokens ``start .. stop`` of a sequence."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        """The step yields a token for it."""
        return self.stop >= self.sequence.n_prompt

    @property
    def is_decode(self) -> bool:
        return self.start >= self.sequence.n_prompt


@dataclass(frozen=True, slots=True)
class Schedule:
    work: tuple[Work, ...]
    """Decodes first, then prompt chunks."""
    granted: tuple[Reservation, ...]
    """Reservations that now have their blocks."""


class Scheduler:
    def __init__(self, blocks: BlockManager, chunk_tokens: int, max_sequences: int) -> None:
        self.blocks = blocks
        self.chunk_tokens = chunk_tokens
        self.places = min(max_sequences, chunk_tokens)
        self.queue: deque[Sequence | Reservation] = deque()
        self.reserved: dict[str, Reservation] = {}
        self.starting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, entry: Sequence | Reservation) -> None:
        """Queue it. Raises PromptTooLong if it does not fit even an empty cache."""
        if not self.blocks.fits(entry.n_tokens):
            room = self.blocks.n_blocks * self.blocks.block_size
            raise PromptTooLong(f"{entry.n_tokens} tokens do not fit the KV cache of {room} tokens")
        self.queue.append(entry)

    def start(self, sequence: Sequence) -> None:
        """A decoding sequence takes over the blocks of its granted reservation."""
        reservation = self.reserved.pop(sequence.request_id)
        sequence.blocks = reservation.blocks
        self.starting.append(sequence)

    def keep(self, sequence: Sequence) -> None:
        """Give up its running place; its blocks stay."""
        sequence.become(Phase.KEPT)
        self.running.remove(sequence)

    def end(self, request_id: str) -> None:
        """Forget the request, wherever it is, and free its blocks. Idempotent."""
        self.queue = deque(entry for entry in self.queue if entry.request_id != request_id)
        self.starting = deque(entry for entry in self.starting if entry.request_id != request_id)
        self.running = [entry for entry in self.running if entry.request_id != request_id]
        self.reserved.pop(request_id, None)
        self.blocks.release(request_id)

    def usage(self) -> dict[str, int]:
        """Blocks by what they are doing; together, all of them. ``leased``: kept for a consumer."""
        pinned = sum(len(entry.blocks) for entry in (*self.running, *self.starting))
        reserved = sum(len(entry.blocks) for entry in self.reserved.values())
        free = self.blocks.n_free
        leased = self.blocks.n_blocks - free - pinned - reserved
        return {"free": free, "pinned": pinned, "reserved": reserved, "leased": leased}

    def schedule(self) -> Schedule:
        granted = self._admit()
        work = [
            Work(sequence, sequence.computed, sequence.computed + 1)
            for sequence in self.running
            if sequence.phase is Phase.DECODE
        ]
        budget = self.chunk_tokens - len(work)
        prompts = [sequence for sequence in self.running if sequence.phase is Phase.PREFILL]
        prompts.sort(key=lambda sequence: not sequence.complete)
        for sequence in prompts:
            stop = min(sequence.ready_until, sequence.computed + budget)
            if stop > sequence.computed:
                work.append(Work(sequence, sequence.computed, stop))
                budget -= stop - sequence.computed
        return Schedule(tuple(work), granted)

    def _admit(self) -> tuple[Reservation, ...]:
        granted: list[Reservation] = []
        while self.starting and len(self.running) < self.places:
            self.running.append(self.starting.popleft())
        while self.queue:
            entry = self.queue[0]
            if isinstance(entry, Sequence) and len(self.running) >= self.places:
                break
            blocks = self.blocks.allocate(entry.request_id, entry.n_tokens)
            if blocks is None:
                break
            self.queue.popleft()
            entry.blocks = blocks
            if isinstance(entry, Sequence):
                entry.become(Phase.PREFILL)
                self.running.append(entry)
            else:
                self.reserved[entry.request_id] = entry
                granted.append(entry)
        return tuple(granted)
