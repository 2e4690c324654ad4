"""Names for full KV blocks, so that a prompt finds what another one has computed. No torch.

A block's name is a hash over the name of the block before it, its token ids and, for each image or
video that has rows in it, what that item is and the number of the first of these rows. By
induction it names everything before the block as well. Equal names mean equal KV: keys and values
at a position follow, by causal attention, from the embeddings and the position ids up to there.
Embeddings follow from the tokens and, where rows stand, from the item, whose content key covers
its bytes, its processing, the model and the dtype. Position ids count tokens from the start, and
where they have axes (M-RoPE) jump and fan out by the items' kinds, grids and seconds between
frames, which are hashed along with the key. How the answer is drawn has no part in any of it.

Where a model computes a run of rows as a whole, in both directions, keys and values of its first
rows follow from its last ones too: a block with rows of a run is named by all items in that run,
also by those that stand behind the block.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from triptych.engine.sequence import Item, ItemSpan, Run

NAME_NBYTES = 16
"""Two blocks of different content have one name with a probability that nobody will see."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Of one item: the first token behind them, what it is, and the rows of items before it."""

    stop: int
    fact: bytes
    rows_before: int


class BlockNames:
    """Of the blocks of one sequence, made as they are asked for.

    ``items``, ``spans`` and ``row_positions``: of the sequence, as from ``locate_items``. ``runs``:
    as in ``Sequence``. From the first row of an item without a key on, or of its run, blocks have
    no name.
    """

    def __init__(
        self,
        token_ids: Seq[int],
        items: Seq[Item],
        spans: Seq[ItemSpan],
        row_positions: Seq[int],
        block_size: int,
        runs: Seq[Run] = (),
    ) -> None:
        self._runs = runs
        self._ids = array("q", token_ids)
        self._size = block_size
        self._row_positions = row_positions
        self._rows: list[_Rows] = []
        self._most: int | None = None
        """Tokens that can have names, where not all can."""
        self._names: list[bytes] = []
        before = 0
        for item, span in zip(items, spans, strict=True):
            if not span.key:
                self._most = self._run_at(item.start)[0]
                break
            what = (span.key, span.kind, span.rows, span.grid, span.second_per_grid)
            self._rows.append(_Rows(item.stop, repr(what).encode(), before))
            before += span.rows

    def extend(self, token_ids: Iterable[int]) -> None:
        """More tokens, without rows."""
        self._ids.extend(token_ids)

    def each(self, n_tokens: int) -> Iterator[bytes]:
        """Of the full blocks among the first ``n_tokens``, one after the other: none is made before
        it is asked for."""
        known = len(self._ids) if self._most is None else self._most
        for number in range(min(n_tokens, known) // self._size):
            if number == len(self._names):
                self._names.append(self._name(number))
            yield self._names[number]

    def first(self, n_tokens: int) -> list[bytes]:
        """All of them."""
        return list(self.each(n_tokens))

    def _name(self, number: int) -> bytes:
        first, last = number * self._size, (number + 1) * self._size
        name = hashlib.blake2b(self._ids[first:last].tobytes(), digest_size=NAME_NBYTES)
        if number:
            name.update(self._names[-1])
        row, last_row = (bisect_left(self._row_positions, token) for token in (first, last))
        if row < last_row:
            end = self._run_at(self._row_positions[last_row - 1])[1]
            last_row = bisect_left(self._row_positions, end)
            for rows in self._rows[bisect_left(self._rows, first + 1, key=lambda r: r.stop) :]:
                if rows.rows_before >= last_row:
                    break
                offset = max(0, row - rows.rows_before)
                name.update(b"|%d|%d|" % (offset, len(rows.fact)) + rows.fact)
        return name.digest()

    def _run_at(self, token: int) -> Run:
        """The run that a row stands in; where none are known the row alone."""
        number = bisect_left(self._runs, token + 1, key=lambda run: run[1])
        inside = number < len(self._runs) and self._runs[number][0] <= token
        return self._runs[number] if inside else (token, token + 1)
