"""What becomes of prompts some of whose images have not landed. Plain data in and out.

"always": they are like others. "off": they wait in the queue, where others pass them, but for a
*cramped* one: its images do not fit where they land all at once, so that it is like others.
"adaptive": prompts that are complete go first, into places and into steps; the others fill what
would be idle otherwise, where they have enough to be worth it, take blocks from nobody and give
theirs up first, and hold half of the cache at most while others run. One that has been passed by a
certain amount of work counts as complete, so that it is not passed forever: it may be cramped.
"""

from __future__ import annotations

from typing import Literal

from triptych.engine.sequence import Reservation, Sequence

Overlap = Literal["adaptive", "off", "always"]
WORTH = 20
"""Tokens of an incomplete prompt, for each sequence that decodes, that are worth the time by which
a chunk of their own makes a step longer; fewer are computed together with those of later images
(docs/benchmarks/engine.md)."""
TEXT_PART = 8
"""An eighth of a step of text, where an image that has not landed is next, is worth a step. Less
would have that image wait: on a GPU small steps take as long to launch as large ones. Rows that
have landed do not wait so, since others may need the memory that they are in."""
PATIENCE = 64
"""Full steps of others by which an incomplete prompt may be passed."""


def goes_first(entry: Sequence | Reservation, overlap: Overlap, chunk_tokens: int) -> bool:
    """It is complete, or like one that is."""
    if isinstance(entry, Reservation) or overlap == "always" or entry.complete:
        return True
    if overlap == "off":
        return entry.cramped
    return entry.passed >= PATIENCE * chunk_tokens


def is_worth(sequence: Sequence, start: int, stop: int, n_decodes: int, chunk_tokens: int) -> bool:
    """Should tokens ``start .. stop`` of an incomplete prompt be in a step with so many decodes?"""
    least = chunk_tokens // TEXT_PART if sequence.is_text_at(start) else 1
    return stop - start >= max(1, least, WORTH * n_decodes)
