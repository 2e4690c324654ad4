"""From logits to tokens. A draw depends on the logits and (seed, choice, index), nothing else.

The random number comes from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", 2011), a function from a key and a counter to 128 bits: nothing is stored between steps,
and another worker that computes the same token draws the same number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.engine.copies import ToHost, to_device
from triptych.request import Sampling, TopLogprob

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row of logits becomes a token."""

    sampling: Sampling
    index: int
    """Of the token in the answer."""


@dataclass(frozen=True, slots=True)
class Sampled:
    token: int
    logprob: float | None
    """Of the token, in the model's own distribution (before temperature and cuts)."""
    top: tuple[TopLogprob, ...]
    """The likeliest tokens, the first one first."""


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four random 32-bit words."""
    a, b, c, d = counter
    k, m = key
    for _ in range(_ROUNDS):
        left, right = _MULTIPLIERS[0] * a, _MULTIPLIERS[1] * c
        a, b = (right >> 32) ^ b ^ k, right & _WORD
        c, d = (left >> 32) ^ d ^ m, left & _WORD
        k, m = (k + _WEYL[0]) & _WORD, (m + _WEYL[1]) & _WORD
    return a, b, c, d


def uniform(seed: int, choice: int, index: int) -> float:
    """A number in [0, 1), of 24 bits so that float32 holds it exactly."""
    words = philox((index & _WORD, choice & _WORD, 0, 0), (seed & _WORD, (seed >> 32) & _WORD))
    return (words[0] >> 8) / (1 << 24)


@dataclass(frozen=True, slots=True)
class _Logprobs:
    wanted: dict[int, int]
    """How many of the likeliest tokens, by row."""
    own: Tensor
    """(wanted,) of the rows' tokens."""
    values: Tensor
    """(wanted, most), the largest first."""
    indices: Tensor
    """Whose those are."""

    @classmethod
    def of(cls, logits: Tensor, tokens: Tensor, wanted: dict[int, int]) -> _Logprobs:
        rows = to_device(list(wanted), logits.device)
        logprobs = logits.index_select(0, rows).log_softmax(-1)
        own = logprobs.gather(1, tokens.index_select(0, rows)[:, None]).squeeze(1)
        values, indices = logprobs.topk(min(max(wanted.values()), logits.shape[1]), dim=-1)
        return cls(wanted, own, values, indices)

    def by_row(
        self, own: list[float], values: list[list[float]], indices: list[list[int]]
    ) -> dict[int, tuple[float, tuple[TopLogprob, ...]]]:
        """For each row: its token's log-probability, and the likeliest tokens'. From the tensors'
        content, on the host."""
        return {
            row: (own[i], tuple(map(TopLogprob, indices[i][:n], values[i][:n])))
            for i, (row, n) in enumerate(self.wanted.items())
        }


class Samples:
    """A token for each of a step's rows, once the device has computed it."""

    def __init__(self, tokens: Tensor, logprobs: _Logprobs | None) -> None:
        self.tokens = tokens
        """(rows,) int64 on the device, for what is computed there next."""
        self._logprobs = logprobs
        found = [tokens, *((logprobs.own, logprobs.values, logprobs.indices) if logprobs else ())]
        self._copies = ToHost(found, tokens.device)

    def read(self) -> list[Sampled]:
        """Waits for the device, but not for what it was given after these."""
        tokens, *rest = (tensor.tolist() for tensor in self._copies.wait())
        logprobs = self._logprobs.by_row(*rest) if self._logprobs else {}
        return [Sampled(token, *logprobs.get(row, (None, ()))) for row, token in enumerate(tokens)]


def sample(logits: Tensor, draws: Sequence[Draw]) -> Samples:
    """One token for each row of ``logits``, (rows, vocabulary) float32, which may be overwritten
    by whatever the device is given next."""
    tokens = logits.argmax(-1)
    drawn = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if drawn:
        rows = to_device(drawn, logits.device)
        chosen = _draw(logits.index_select(0, rows), [draws[row] for row in drawn])
        tokens = tokens.index_copy(0, rows, chosen)
    wanted = {row: d.sampling.logprobs for row, d in enumerate(draws) if d.sampling.logprobs >= 0}
    return Samples(tokens, _Logprobs.of(logits, tokens, wanted) if wanted else None)


def _draw(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Inverse of the cumulative distribution that temperature, top_k and then top_p leave.

    (rows, vocabulary) to (rows,) int64.
    """

    def column(values: list[float]) -> Tensor:
        return to_device(values, logits.device, logits.dtype)[:, None]

    temperature = column([draw.sampling.temperature for draw in draws])
    top_k = column([draw.sampling.top_k or logits.shape[1] for draw in draws])
    top_p = column([draw.sampling.top_p for draw in draws])
    random = column([uniform(d.sampling.seed, d.sampling.choice, d.index) for d in draws])

    ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)
    weights = ((ordered - ordered[:, :1]) / temperature).exp()
    weights *= torch.arange(logits.shape[1], device=logits.device) < top_k
    before = weights.cumsum(-1) - weights
    weights *= before < top_p * weights.sum(-1, keepdim=True)
    weights[:, 0] = 1.0  # the likeliest stays, whatever top_p is
    cumulative = weights.cumsum(-1)
    rank = (cumulative <= random * cumulative[:, -1:]).sum(-1, keepdim=True)
    last = weights.count_nonzero(-1).unsqueeze(-1) - 1
    return tokens.gather(1, torch.minimum(rank, last)).squeeze(1)
