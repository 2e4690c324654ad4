"""Decode steps one ahead: what a device may compute before anybody has seen the step before it.

The tokens of a decode step decide little about the next one. Its ids are on the device already;
positions, blocks and random numbers follow from how many tokens there are, not from which. So it is
launched while the first still computes, and the device does not wait for the host between the two.

What a token can decide is whether the sequence goes on. One that ends with it, or is cancelled
meanwhile, has its result of the step behind thrown away. Its blocks are free at once all the same:
as long as anything is launched they are only given to steps behind that one, on the same stream.
``Scheduler.schedule`` alone gives blocks to those who write to them in another way, or lets others
find them, and it is only called when nothing is launched.
"""

from __future__ import annotations

from triptych.engine.scheduler import Scheduler
from triptych.engine.sequence import Phase
from triptych.engine.work import Schedule, Work


def follow(work: tuple[Work, ...], scheduler: Scheduler) -> Schedule | None:
    """What to compute behind ``work``, which is launched and whose tokens are not known: the next
    token of each of its sequences that is still there and has not all it may have.

    None, if ``schedule`` would do anything besides: compute a prompt, let somebody in, take blocks
    away. It is called then, once the results are there.
    """
    decoding = {w.sequence for w in work if w.is_decode and w.sequence.phase is Phase.DECODE}
    if not all(w.is_decode for w in work) or any(
        sequence not in decoding and scheduler.computes(sequence, len(decoding))
        for sequence in scheduler.running
    ):
        return None
    going = tuple(
        Work(w.sequence, w.stop, w.stop + 1)
        for w in work
        if w.sequence in decoding and len(w.sequence.output) + 1 < w.sequence.sampling.max_tokens
    )
    makes_room = len(going) < len(decoding) and (scheduler.queue or scheduler.starting)
    if not going or makes_room or scheduler.admits():
        return None
    return scheduler.extend(going)
