"""Figures of a load: the steady state, quantiles, goals, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from triptych.bench.config import Goal
from triptych.bench.figures import Sample, Spread, reached, spread, summarize, window


def sample(due: float, ttft: float, tpot: float, n: int = 5, error: str = "") -> Sample:
    """An answer of ``n`` tokens that come one by one; the stream ends with the last."""
    texts = [due + ttft + i * tpot for i in range(n)]
    end = texts[-1]
    return Sample(due=due, sent_at=due, texts=texts, end=end, n_prompt=100, n_output=n, error=error)


def test_a_closed_loop_is_steady_while_all_its_loops_go_round() -> None:
    ends = [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 9.0]  # two at a time; the last two run dry
    assert window(ends, 2) == (1.5, 5.0)
    assert window(ends[:6], 2) == (1.5, 3.0)
    assert window(ends[:5], 2) is None
    assert window([1.0, 2.0, 3.0], 1) == (1.0, 2.0)


def test_an_open_loop_is_steady_between_its_first_and_its_last_tenth() -> None:
    ends = [float(i) for i in range(1, 21)]
    assert window(ends, None) == (2.0, 18.0)
    assert window(ends[:5], None) == (1.0, 4.0)
    assert window([], None) is None
    assert window([1.0, 1.0, 1.0, 1.0], None) is None, "no time passes between them"


def test_rates_of_the_whole_and_of_the_steady_state() -> None:
    # Two loops, an answer every two seconds each, in turn: one a second while both run.
    samples = [sample(float(i), 1.0, 0.25) for i in range(10)]
    found = summarize(samples, Goal(), 2)
    assert found.whole.requests == 10 and found.whole.seconds == 11.0
    assert found.whole.requests_per_s == pytest.approx(10 / 11)
    assert found.whole.output_tokens_per_s == pytest.approx(50 / 11)
    assert found.steady is not None
    assert (found.steady.requests, found.steady.seconds) == (6, 6.0)
    assert found.steady.requests_per_s == 1.0
    assert found.steady.prompt_tokens_per_s == 100.0
    assert found.errors == {}
    for part in (found.whole, found.steady):
        assert part.ttft == Spread(mean=1000, p50=1000, p90=1000, p99=1000)
        assert part.tpot is not None and part.tpot.p50 == pytest.approx(250)
        assert part.itl is not None and part.itl.p99 == pytest.approx(250)
        assert part.e2e is not None and part.e2e.mean == pytest.approx(2000)
        assert part.good_per_s is part.good_percent is None


def test_a_burst_has_no_steady_state() -> None:
    at_once = [sample(0.0, 1.0 + i / 10, 0.25) for i in range(40)]
    assert summarize(at_once, Goal(), None).steady is None
    over_time = [sample(float(i), 1.0, 0.25) for i in range(40)]
    assert summarize(over_time, Goal(), None).steady is not None


def test_pieces_of_several_tokens_count_as_their_tokens() -> None:
    found = Sample(due=1.0, sent_at=0.0, texts=[1.5, 2.5], end=2.6, n_output=11)
    assert found.ttft == 0.5 and found.tpot == pytest.approx(0.1)
    lone = Sample(due=1.0, sent_at=0.0, texts=[1.5], end=2.6, n_output=1)
    assert lone.tpot is None and lone.e2e == pytest.approx(1.6)


def test_goodput_counts_answers_that_reach_every_goal() -> None:
    fast, slow_first, slow_rest = (
        sample(0.0, 0.1, 0.02), sample(0.0, 0.9, 0.02), sample(0.0, 0.1, 0.2),
    )  # fmt: skip
    both = Goal(slo_ttft=500, slo_tpot=50)
    assert [reached(each, both) for each in (fast, slow_first, slow_rest)] == [True, False, False]
    assert [reached(s, Goal(slo_tpot=50)) for s in (fast, slow_first, slow_rest)] == [1, 1, 0]
    assert reached(sample(0.0, 0.1, 1.0, n=1), both), "one token has no time per output token"
    found = summarize([fast, slow_first, slow_rest], both, 1).whole
    assert found.good_percent == pytest.approx(100 / 3)
    assert found.good_per_s == pytest.approx(1 / found.seconds)


def test_errors_are_counted_by_kind_and_nowhere_else() -> None:
    samples = [
        sample(0.0, 1.0, 0.1),
        sample(0.0, 0.001, 0.0, error="status 429"),
        sample(0.0, 0.001, 0.0, error="status 429"),
        Sample(due=0.0, sent_at=0.0, end=0.5, error="timeout"),
        Sample(due=0.0, sent_at=0.0),
    ]
    found = summarize(samples, Goal(), 1)
    assert found.errors == {"not finished": 1, "status 429": 2, "timeout": 1}
    assert found.whole.requests == 1 and found.whole.ttft is not None
    assert found.whole.ttft.mean == 1000.0


def test_without_a_good_answer_there_are_no_figures() -> None:
    found = summarize([Sample(due=0.0, sent_at=0.0, end=1.0, error="timeout")], Goal(9, 9), None)
    assert found.steady is None and found.whole.requests == 0
    assert found.whole.requests_per_s == 0.0 and found.whole.good_percent is None
    assert found.whole.ttft is found.whole.e2e is None


def test_quantiles_are_interpolated() -> None:
    values = np.random.default_rng(0).exponential(1.0, 37).tolist()
    found = spread(values)
    assert found is not None
    ranked = sorted(values)
    for q, value in ((0.5, found.p50), (0.9, found.p90), (0.99, found.p99)):
        low, share = math.floor(q * 36), q * 36 - math.floor(q * 36)
        slow = ranked[low] + share * (ranked[min(low + 1, 36)] - ranked[low])
        assert value == pytest.approx(1000 * slow)
    assert found.mean == pytest.approx(1000 * sum(values) / 37)
    assert spread([]) is None
