"""What the samples of a load say. Pure: plain data in, plain data out. Times in seconds in
samples, in milliseconds in figures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np

from triptych.bench.config import Goal

CUT = 0.1
"""Of an open loop's answers, so many at either end are its ramp and its tail."""


class Sample(msgspec.Struct, kw_only=True):
    """One request as its client saw it. Times since the load began."""

    due: float
    """When it was to be sent, in an open loop; in a closed one when it was."""
    sent_at: float
    """Wall clock, seconds since the epoch."""
    url: str = ""
    request_id: str = ""
    """As the server names it in x-request-id."""
    texts: list[float] = []
    """When each piece of text came."""
    end: float | None = None
    """None while it is under way."""
    n_prompt: int = 0
    n_output: int = 0
    error: str = ""
    """Its kind."""

    @property
    def good(self) -> bool:
        return self.end is not None and not self.error

    @property
    def ttft(self) -> float:
        return self.texts[0] - self.due

    @property
    def e2e(self) -> float:
        assert self.end is not None
        return self.end - self.due

    @property
    def tpot(self) -> float | None:
        """Of an answer of one token there is none."""
        if self.n_output < 2:
            return None
        return (self.texts[-1] - self.texts[0]) / (self.n_output - 1)


class Spread(msgspec.Struct, frozen=True):
    """Milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Good answers of a stretch of time."""

    requests: int
    seconds: float
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    good_per_s: float | None
    """Answers within the goal a second; None where there is no goal."""
    good_percent: float | None
    ttft: Spread | None
    """From when it was due to the first text."""
    tpot: Spread | None
    """Between tokens, averaged over each answer."""
    itl: Spread | None
    """Between one piece of text and the next."""
    e2e: Spread | None


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    whole: Part
    """From the first request to the last answer."""
    steady: Part | None
    """Without ramp and tail; None where too few answers are left."""
    errors: dict[str, int]
    """By kind."""


def summarize(samples: Sequence[Sample], goal: Goal, concurrency: int | None) -> Summary:
    """``concurrency`` of a closed loop; None: open, which has no steady state if its last request
    was sent before that would begin."""
    good = [sample for sample in samples if sample.good]
    errors = Counter(sample.error or "not finished" for sample in samples if not sample.good)
    ends = sorted(sample.end for sample in good if sample.end is not None)
    begin = min((sample.due for sample in good), default=0.0)
    found = window(ends, concurrency)
    steady = None
    last = max((sample.due for sample in samples), default=0.0)
    if found is not None and (concurrency is not None or last > found[0]):
        after, until = found
        inside = [s for s in good if s.end is not None and after < s.end <= until]
        steady = _part(inside, until - after, goal)
    whole = _part(good, ends[-1] - begin if ends else 0.0, goal)
    return Summary(whole=whole, steady=steady, errors=dict(sorted(errors.items())))


def window(ends: Sequence[float], concurrency: int | None) -> tuple[float, float] | None:
    """(after, until) of the steady state, from the sorted times of answers' ends.

    A closed loop is in it from when each of its requests in flight has been followed by another
    until it sends its last; an open loop between the first and the last tenth of its answers.
    None if fewer answers lie within than are cut at one end.
    """
    cut = concurrency if concurrency is not None else math.ceil(CUT * len(ends))
    if cut < 1 or len(ends) < 3 * cut:
        return None
    after, until = ends[cut - 1], ends[len(ends) - cut - 1]
    return (after, until) if until > after else None


def _part(samples: Sequence[Sample], seconds: float, goal: Goal) -> Part:
    per_s = 1 / seconds if seconds > 0 else 0.0
    n_good = sum(reached(sample, goal) for sample in samples)
    wanted = goal.slo_ttft is not None or goal.slo_tpot is not None
    return Part(
        requests=len(samples),
        seconds=seconds,
        requests_per_s=len(samples) * per_s,
        prompt_tokens_per_s=sum(sample.n_prompt for sample in samples) * per_s,
        output_tokens_per_s=sum(sample.n_output for sample in samples) * per_s,
        good_per_s=n_good * per_s if wanted else None,
        good_percent=100 * n_good / len(samples) if wanted and samples else None,
        ttft=spread([sample.ttft for sample in samples]),
        tpot=spread([sample.tpot for sample in samples if sample.tpot is not None]),
        itl=spread([b - a for s in samples for a, b in zip(s.texts, s.texts[1:], strict=False)]),
        e2e=spread([sample.e2e for sample in samples]),
    )


def reached(sample: Sample, goal: Goal) -> bool:
    """Whether a good answer came as fast as it should."""
    if goal.slo_ttft is not None and 1000 * sample.ttft > goal.slo_ttft:
        return False
    return goal.slo_tpot is None or sample.tpot is None or 1000 * sample.tpot <= goal.slo_tpot


def spread(seconds: Sequence[float]) -> Spread | None:
    """In milliseconds; quantiles are interpolated. None of nothing."""
    if not seconds:
        return None
    p50, p90, p99 = np.quantile(seconds, (0.5, 0.9, 0.99)).tolist()
    mean = sum(seconds) / len(seconds)
    return Spread(mean=1000 * mean, p50=1000 * p50, p90=1000 * p90, p99=1000 * p99)
