"""Steps one ahead: what a device may compute before anybody has seen the step before it.

The tokens of a decode step decide little about the next one. Its ids are on the device already;
positions, blocks and random numbers follow from how many tokens there are, not from which. So it is
launched while the first still computes, and the device does not wait for the host between the two.

What a token can decide is whether the sequence goes on. One that ends with it, or is cancelled
meanwhile, has its result of the step behind thrown away. Its blocks are free at once all the same:
as long as anything is launched they are only given to steps behind that one, on the same stream.
``Scheduler.schedule`` alone gives blocks to those who write to them in another way, or lets others
find them, and it is only called when nothing is launched.

Nor does a token decide about the next chunk of a prompt that has steps for itself, or shares them
with decodes only. Whoever comes while such a step is computed would wait for one more, so that one
is launched only when the first is nearly over and nobody has come.
"""

from __future__ import annotations

from triptych.engine.scheduler import Scheduler
from triptych.engine.sequence import Phase, Trust
from triptych.engine.work import Schedule, Work


def follow(work: tuple[Work, ...], scheduler: Scheduler) -> Schedule | None:
    """What to compute behind ``work``, which is launched and whose tokens are not known: the next
    token of each of its sequences that is still there and has not all it may have, and the next
    chunk of the prompt that ``goes_on``.

    None, if ``schedule`` would do anything besides: compute another prompt, let somebody in, take
    blocks away. It is called then, once the results are there.
    """
    chunk = work[-1] if goes_on(work) else None
    decodes = work if chunk is None else work[:-1]
    decoding = {w.sequence for w in decodes if w.is_decode and w.sequence.phase is Phase.DECODE}
    if not all(w.is_decode for w in decodes) or any(
        s.phase is Phase.DECODE and s not in decoding for s in scheduler.running
    ):
        return None
    going = tuple(
        Work(w.sequence, w.stop, w.stop + 1)
        for w in decodes
        if w.sequence in decoding and len(w.sequence.output) + 1 < w.sequence.sampling.max_tokens
    )
    makes_room = len(going) < len(decoding) and (scheduler.queue or scheduler.starting)
    if makes_room or scheduler.admits():
        return None
    if chunk is not None:
        stop = _next_stop(chunk, len(going), scheduler)
        if stop is None:
            return None
        going = (*going, Work(chunk.sequence, chunk.stop, stop))
    elif _others(None, len(decoding), scheduler):
        return None
    return scheduler.extend(going) if going else None


def _others(chunk: Work | None, n_decodes: int, scheduler: Scheduler) -> bool:
    """Would a step with so many decodes compute something of another prompt?"""
    return any(
        sequence.phase is Phase.PREFILL and scheduler.computes(sequence, n_decodes)
        for sequence in scheduler.running
        if chunk is None or sequence is not chunk.sequence
    )


def _next_stop(chunk: Work, n_decodes: int, scheduler: Scheduler) -> int | None:
    """Where the chunk behind ``chunk`` ends, if the next step has that one and no other."""
    sequence, budget = chunk.sequence, scheduler.chunk_tokens - n_decodes
    stop = scheduler.reaches(sequence, chunk.stop, budget)
    if _others(chunk, n_decodes, scheduler):
        prompts = [s for s in scheduler.running if s.phase is Phase.PREFILL]
        first = [s for s in prompts if scheduler.goes_first(s)]
        is_oldest = first[:1] == [sequence]
        short = [s for s in scheduler.short(first, budget) if s is not sequence]
        alone = is_oldest and not short and stop == chunk.stop + budget
    else:
        alone = scheduler.worth(sequence, chunk.stop, stop, n_decodes)
    return stop if alone and stop > chunk.stop else None


def goes_on(work: tuple[Work, ...]) -> bool:
    """Is there one chunk in it, that brings no token, of a prompt that will be computed further
    whatever becomes of the step? Not one whose rows may be taken back."""
    if not work or work[-1].is_decode or work[-1].samples:
        return False
    sequence = work[-1].sequence
    lent = any(item.trust is Trust.BORROWED for item in sequence.items)
    alone = all(w.is_decode for w in work[:-1])
    return alone and sequence.phase is Phase.PREFILL and not lent
