"""Blocks against plain sets of free and of remembered numbers."""

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


def test_what_is_named_is_found_until_its_memory_is_needed() -> None:
    blocks = BlockManager(4, 16)
    assert blocks.grow("a", 48) == (0, 1, 2)
    for block, name in enumerate((b"x", b"y", b"z")):
        blocks.name(block, name)
    assert blocks.find([b"x", b"y", b"?", b"z"]) == (0, 1)
    blocks.release("a")
    assert (blocks.n_free, blocks.n_idle) == (4, 3)
    assert blocks.find([b"x", b"y", b"z"]) == (0, 1, 2)
    assert blocks.grow("b", 32) == (3, 2)  # what has no name first, then the end of a's
    assert blocks.find([b"x", b"y", b"z"]) == (0, 1)


def test_a_block_that_several_hold() -> None:
    blocks = BlockManager(4, 16)
    blocks.grow("a", 32)
    blocks.name(0, b"x")
    blocks.share("b", blocks.find([b"x"]))
    assert blocks.grow("b", 32) == (0, 2)
    assert (blocks.n_free, blocks.count_idle((0, 2, 3))) == (1, 1)
    blocks.release("a")
    assert (blocks.n_free, blocks.n_idle) == (2, 0)
    assert blocks.grow("c", 32) is not None and blocks.find([b"x"]) == (0,)
    blocks.release("b")
    assert blocks.n_idle == 1 and blocks.find([b"x"]) == (0,)


def test_the_second_of_a_name_is_just_a_block() -> None:
    blocks = BlockManager(2, 16)
    for holder, block in (("a", 0), ("b", 1)):
        blocks.grow(holder, 16)
        blocks.name(block, b"x")
    blocks.release("b")
    assert (blocks.n_free, blocks.n_idle) == (1, 0)
    blocks.release("a")
    assert (blocks.n_free, blocks.n_idle) == (2, 1)


def test_the_least_recently_used_goes_first() -> None:
    blocks = BlockManager(3, 16)
    for number, holder in enumerate("abc"):
        blocks.grow(holder, 16)
        blocks.name(number, holder.encode())
    for holder in "bac":
        blocks.release(holder)
    blocks.share("again", blocks.find([b"b"]))
    blocks.release("again")
    found = []
    for holder in "xyz":
        blocks.grow(holder, 16)
        found.append([name for name in (b"a", b"b", b"c") if blocks.find([name])])
    assert found == [[b"b", b"c"], [b"b"], []]
