"""Which images' rows the engine asks for, and which it gives up. Plain data in and out.

Images are asked for as late as the link allows: those of running sequences and, ahead, those of
prompts that the next few steps may reach. Whoever brings them takes memory in the order in which
they are asked for. So that none who runs waits for memory of one who waits for it to end, all that
was brought or is on its way to the queue is given up, and asked for again, when a sequence is
preempted or one that runs turns out to need more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from triptych.engine.sequence import Phase, Reservation, Rows, Sequence

Image = tuple[Sequence, int]
"""One of a sequence's, by index."""
Entry = Sequence | Reservation


@dataclass(frozen=True, slots=True)
class RowChanges:
    """To be carried out in the order of the fields."""

    returned: tuple[Image, ...]
    """Images whose rows are here and are to be given back."""
    withdrawn: tuple[Sequence, ...]
    """Whatever is still on its way to these is not wanted."""
    wanted: tuple[Image, ...]
    """Images to be brought, the most urgent first."""
    needless: tuple[Image, ...]
    """Images that are not here and will not be asked for again."""


class RowRequests:
    """``ahead``: tokens of prompts, running ones included, whose images may be asked for."""

    def __init__(self, ahead: int, block_size: int) -> None:
        self._ahead = ahead
        self._block_size = block_size
        self._returned: list[Image] = []
        self._withdrawn: list[Sequence] = []
        self._needless: list[Image] = []

    def found(self, sequence: Sequence) -> None:
        """The KV of its ``computed`` tokens is there: no rows are needed for it."""
        for index, item in enumerate(sequence.items):
            if item.stop <= sequence.computed and item.where is not Rows.USED:
                there = item.where is Rows.LANDED
                (self._returned if there else self._needless).append((sequence, index))
                item.where = Rows.USED

    def give_up(self, entries: Iterable[Entry]) -> None:
        """None of these holds memory for rows, or waits for it."""
        for entry in entries:
            if isinstance(entry, Reservation):
                continue
            if any(item.where is Rows.ASKED for item in entry.items):
                self._withdrawn.append(entry)
            self._returned += [(entry, item) for item in entry.give_back()]

    def ask(
        self,
        running: Seq[Sequence],
        queue: Seq[Entry],
        find: Callable[[Sequence], Seq[int]],
    ) -> RowChanges:
        """All that has changed since this was last called. ``find``: blocks of a prompt's beginning
        that are there."""
        wanted = tuple(self._wanted(running, queue, find))
        returned, self._returned = tuple(self._returned), []
        withdrawn, self._withdrawn = tuple(self._withdrawn), []
        needless, self._needless = tuple(self._needless), []
        return RowChanges(returned, withdrawn, wanted, needless)

    def _wanted(
        self,
        running: Seq[Sequence],
        queue: Seq[Entry],
        find: Callable[[Sequence], Seq[int]],
    ) -> Iterator[Image]:
        ahead = self._ahead
        for sequence in running:
            if sequence.phase is Phase.DECODE:
                continue  # it has used all of its rows
            ahead -= max(0, sequence.n_prompt - sequence.computed)
            more = list(_ask(sequence))
            if more:
                self.give_up(queue)
            yield from more
        for entry in queue:
            if ahead <= 0:
                break
            if isinstance(entry, Sequence):
                if entry.foreseen < 0:
                    entry.foreseen = len(find(entry)) * self._block_size
                ahead -= entry.n_prompt - entry.foreseen
                yield from _ask(entry)


def _ask(sequence: Sequence) -> Iterator[Image]:
    for index, item in enumerate(sequence.items):
        away = item.where in (Rows.AWAY, Rows.RETURNED)
        if away and item.stop > sequence.foreseen:
            item.where = Rows.ASKED
            yield sequence, index
