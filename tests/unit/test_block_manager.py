"""Blocks against a plain set of free numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.engine.block_manager import BlockManager


def test_blocks_for_rounds_up() -> None:
    blocks = BlockManager(4, 16)
    assert [blocks.blocks_for(n) for n in (0, 1, 16, 17, 64)] == [0, 1, 1, 2, 4]
    assert blocks.fits(64) and not blocks.fits(65)


def test_all_or_nothing() -> None:
    blocks = BlockManager(4, 16)
    assert blocks.allocate("a", 33) == (0, 1, 2)
    assert blocks.allocate("b", 17) is None
    assert blocks.n_free == 1
    assert blocks.allocate("b", 16) == (3,)


def test_release_is_idempotent() -> None:
    blocks = BlockManager(4, 16)
    blocks.allocate("a", 64)
    blocks.release("a")
    blocks.release("a")
    blocks.release("never seen")
    assert blocks.n_free == 4


def test_a_holder_allocates_once() -> None:
    blocks = BlockManager(4, 16)
    blocks.allocate("a", 1)
    with pytest.raises(AssertionError):
        blocks.allocate("a", 1)


@given(
    st.integers(1, 12),
    st.integers(1, 5),
    st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(1, 30)), max_size=60),
)
def test_no_block_is_held_twice_or_lost(
    n_blocks: int, size: int, calls: list[tuple[bool, int, int]]
) -> None:
    blocks = BlockManager(n_blocks, size)
    held: dict[str, tuple[int, ...]] = {}
    for allocate, who, n_tokens in calls:
        name = str(who)
        if not allocate:
            blocks.release(name)
            held.pop(name, None)
        elif name not in held:
            free = n_blocks - sum(map(len, held.values()))
            got = blocks.allocate(name, n_tokens)
            assert (got is not None) == (-(-n_tokens // size) <= free)
            if got is not None:
                held[name] = got
        every = [block for given in held.values() for block in given]
        assert len(every) == len(set(every))
        assert set(every) <= set(range(n_blocks))
        assert blocks.n_free == n_blocks - len(every)
