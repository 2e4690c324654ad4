"""Blocks against a plain set of free numbers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from triptych.engine.block_manager import BlockManager


def test_blocks_for_rounds_up() -> None:
    blocks = BlockManager(4, 16)
    assert [blocks.blocks_for(n) for n in (0, 1, 16, 17, 64)] == [0, 1, 1, 2, 4]
    assert blocks.fits(64) and not blocks.fits(65)


def test_all_or_nothing() -> None:
    blocks = BlockManager(4, 16)
    assert blocks.grow("a", 33) == (0, 1, 2)
    assert blocks.grow("b", 17) is None
    assert blocks.n_free == 1
    assert blocks.grow("b", 16) == (3,)


def test_growing_keeps_what_there_is() -> None:
    blocks = BlockManager(4, 16)
    assert blocks.grow("a", 1) == (0,)
    assert blocks.grow("b", 1) == (1,)
    assert blocks.grow("a", 16) == (0,)
    assert blocks.grow("a", 40) == (0, 2, 3)
    assert blocks.grow("a", 65) is None
    assert blocks.grow("a", 3) == (0, 2, 3)


def test_release_is_idempotent() -> None:
    blocks = BlockManager(4, 16)
    blocks.grow("a", 64)
    blocks.release("a")
    blocks.release("a")
    blocks.release("never seen")
    assert blocks.n_free == 4


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
    for grow, who, n_tokens in calls:
        name = str(who)
        before = held.get(name, ())
        if not grow:
            blocks.release(name)
            held.pop(name, None)
        else:
            free = n_blocks - sum(map(len, held.values()))
            more = max(0, -(-n_tokens // size) - len(before))
            got = blocks.grow(name, n_tokens)
            assert (got is not None) == (more <= free)
            if got is not None:
                assert got[: len(before)] == before and len(got) == len(before) + more
                held[name] = got
        every = [block for given in held.values() for block in given]
        assert len(every) == len(set(every))
        assert set(every) <= set(range(n_blocks))
        assert blocks.n_free == n_blocks - len(every)
