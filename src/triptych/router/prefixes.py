"""The beginnings of a prompt by name, so that it is seen which worker has computed one before."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection, Sequence
from itertools import accumulate

from triptych.request import ItemMeta
from triptych.router.placement import PREFIX_TOKENS


def prefixes(
    token_ids: Sequence[int], items: Sequence[ItemMeta], row_token_ids: Collection[int]
) -> list[str]:
    """A name for the first ``PREFIX_TOKENS`` tokens, twice as many, and so on.

    Equal for equal tokens with equal images and videos among them, else not: an item's rows are
    all the same token, so its key counts from its first row on.
    """
    begins = [0, *accumulate(item.rows for item in items)]
    running = hashlib.blake2b(digest_size=16)
    tokens = memoryview(array("q", token_ids)).cast("B")
    found: list[str] = []
    rows = begun = 0
    for start in range(0, len(token_ids) - PREFIX_TOKENS + 1, PREFIX_TOKENS):
        running.update(tokens[8 * start : 8 * (start + PREFIX_TOKENS)])
        if begun < len(items):
            block = token_ids[start : start + PREFIX_TOKENS]
            rows += sum(block.count(token) for token in row_token_ids)
        while begun < len(items) and begins[begun] < rows:
            running.update(items[begun].key.encode())
            begun += 1
        found.append(running.copy().hexdigest())
    return found
