"""What a step computes, and what else is to be done before it. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from triptych.engine.row_requests import RowChanges
from triptych.engine.sequence import Reservation, Sequence


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

    @property
    def ahead(self) -> int:
        """Tokens of the answer that the step before it has still to bring."""
        return self.start - self.sequence.computed if self.is_decode else 0


@dataclass(frozen=True, slots=True)
class Schedule:
    """To be carried out in the order of the fields; ``work`` last."""

    preempted: tuple[Sequence, ...]
    rows: RowChanges
    begun: tuple[Sequence, ...]
    """Sequences that run from now on, with ``computed`` tokens that were found."""
    granted: tuple[Reservation, ...]
    """Reservations that now have their blocks."""
    work: tuple[Work, ...]
    """Decodes first, then prompt chunks."""


def evenly(n_tokens: int, budget: int, unit: int) -> int:
    """Tokens of the next of as few chunks as there must be of ``n_tokens``, each of about the same
    size. A small one at the end would take as long to launch as the others, and the device would
    wait. ``unit``: sizes are multiples of it, but for the last chunk's and that of ``budget``."""
    if not 0 < budget < n_tokens:
        return budget
    count = -(-n_tokens // budget)
    each = -(-n_tokens // count)
    return min(budget, -(-each // unit) * unit)
