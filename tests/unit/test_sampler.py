"""Sampling against published vectors and the slow obvious version."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.engine.sampler import Draw, philox, sample, uniform
from triptych.request import Sampling

torch.set_num_threads(1)


def logits(rows: int = 1, vocabulary: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def slow(row: list[float], sampling: Sampling, random: float) -> int:
    """Temperature, top_k, top_p and the inverse of the cumulative distribution, one by one."""
    order = sorted(range(len(row)), key=lambda token: -row[token])
    weights = [math.exp((row[token] - row[order[0]]) / sampling.temperature) for token in order]
    if sampling.top_k:
        weights = weights[: sampling.top_k]
    kept: list[float] = []
    before, whole = 0.0, sum(weights)
    for weight in weights:
        if kept and before >= sampling.top_p * whole:
            break
        kept.append(weight)
        before += weight
    threshold, cumulative = random * sum(kept), 0.0
    for token, weight in zip(order, kept, strict=False):
        cumulative += weight
        if cumulative > threshold:
            return token
    return order[len(kept) - 1]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_equals_the_published_vectors(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    assert philox(counter, key) == words


def test_uniform_depends_on_each_part_of_the_key() -> None:
    one = uniform(1, 0, 0)
    others = {uniform(2, 0, 0), uniform(1 + (1 << 40), 0, 0), uniform(1, 1, 0), uniform(1, 0, 1)}
    assert len(others) == 4 and one not in others
    assert all(0 <= number < 1 for number in (one, *others))


def test_greedy_is_argmax() -> None:
    rows = logits(5)
    drawn = sample(rows, [Draw(Sampling(max_tokens=1, temperature=0), 0)] * 5).read()
    assert [each.token for each in drawn] == rows.argmax(-1).tolist()
    assert all(each.logprob is None and each.top == () for each in drawn)


@settings(deadline=None, derandomize=True)
@given(
    st.integers(0, 5),
    st.sampled_from([0.2, 0.7, 1.0, 2.0]),
    st.sampled_from([0, 1, 3, 50, 200]),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    st.integers(0, 2**64 - 1),
    st.integers(0, 1000),
)
def test_a_draw_equals_the_slow_version(
    which: int, temperature: float, top_k: int, top_p: float, seed: int, index: int
) -> None:
    sampling = Sampling(max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    row = logits(seed=which)
    [drawn] = sample(row, [Draw(sampling, index)]).read()
    assert drawn.token == slow(row[0].tolist(), sampling, uniform(seed, 0, index))


def test_frequencies_follow_the_distribution() -> None:
    row = torch.tensor([[0.0, 1.0, 2.0, -math.inf]])
    n = 4000
    draws = [Draw(Sampling(max_tokens=1, seed=3), index) for index in range(n)]
    counts = Counter(each.token for each in sample(row.expand(n, -1), draws).read())
    expected = row[0].softmax(-1).tolist()
    assert counts[3] == 0
    assert [counts[token] / n for token in range(3)] == pytest.approx(expected[:3], abs=0.03)


def test_a_draw_does_not_depend_on_the_batch() -> None:
    rows = logits(4)
    draws = [
        Draw(Sampling(max_tokens=1, temperature=0), 0),
        Draw(Sampling(max_tokens=1, top_k=5, seed=1), 3),
        Draw(Sampling(max_tokens=1, top_p=0.5, temperature=3.0, seed=2, logprobs=2), 4),
        Draw(Sampling(max_tokens=1, seed=3, choice=1, logprobs=0), 5),
    ]
    together = sample(rows, draws).read()
    alone = [sample(rows[i : i + 1], [draw]).read()[0] for i, draw in enumerate(draws)]
    assert together == alone


def test_a_cold_temperature_is_greedy_and_does_not_overflow() -> None:
    row = logits() * 1000
    [drawn] = sample(row, [Draw(Sampling(max_tokens=1, temperature=1e-30), 0)]).read()
    assert drawn.token == int(row.argmax())


def test_logprobs_are_the_models_own() -> None:
    row = logits()
    whole = row[0].log_softmax(-1)
    [drawn] = sample(row, [Draw(Sampling(max_tokens=1, temperature=2.0, logprobs=3), 0)]).read()
    assert drawn.logprob == pytest.approx(float(whole[drawn.token]))
    values, tokens = whole.topk(3)
    assert [each.token for each in drawn.top] == tokens.tolist()
    assert [each.logprob for each in drawn.top] == pytest.approx(values.tolist())
