"""Names of blocks: equal exactly where everything up to the block's end is the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.engine.block_manager import BlockManager
from triptych.engine.prefix import BlockNames
from triptych.engine.sequence import ItemSpan, locate_items, runs_of

ROW, SEPARATOR = 900, 901
GRID = (1, 4, 6)
CAT, DOG = ItemSpan(6, GRID, key="cat"), ItemSpan(6, GRID, key="dog")


def names(ids: list[int], spans: list[ItemSpan], size: int = 4, n: int = -1) -> list[bytes]:
    items, rows = locate_items(ids, {ROW}, spans)
    found = BlockNames(ids, items, spans, rows, size)
    return found.first(len(ids) if n < 0 else n)


def common(a: list[bytes], b: list[bytes]) -> int:
    """Blocks that one finds of the other; a name that fits again after a difference is an error."""
    same = [x == y for x, y in zip(a, b, strict=False)]
    first = same.index(False) if False in same else len(same)
    assert not any(same[first:])
    return first


def test_full_blocks_have_names_and_each_its_own() -> None:
    found = names([5] * 11, [])
    assert len(found) == len(set(found)) == 2
    assert names([5] * 12, []) == [*found, names([5] * 12, [])[2]]
    assert names([5] * 12, [], n=7) == found[:1]


def test_a_token_changes_its_block_and_all_behind_it() -> None:
    ids = list(range(16))
    for at in range(16):
        other = [*ids[:at], 99, *ids[at + 1 :]]
        assert common(names(ids, []), names(other, [])) == at // 4


@pytest.mark.parametrize("first", range(6))
def test_another_image_changes_the_block_of_its_first_row(first: int) -> None:
    ids = [1] * first + [ROW] * 6 + [2] * 8
    assert names(ids, [CAT]) == names(ids, [CAT])
    assert common(names(ids, [CAT]), names(ids, [DOG])) == first // 4


@pytest.mark.parametrize(
    "change",
    [{"kind": "video"}, {"grid": (1, 6, 4)}, {"second_per_grid": 0.5}, {"grid": None}],
)
def test_what_positions_follow_from_is_part_of_it(change: dict[str, object]) -> None:
    ids = [1, 2, *[ROW] * 6, 3, 4]
    other = replace(CAT, **change)  # type: ignore[arg-type]
    assert common(names(ids, [CAT]), names(ids, [other])) == 0


def test_rows_count_by_their_number_in_the_item() -> None:
    """The same tokens, and in the second block the same item: but other rows of it."""
    whole, parts = replace(CAT, rows=8), replace(CAT, rows=4)
    assert common(names([ROW] * 8, [whole]), names([ROW] * 8, [parts, parts])) == 0
    apart = [ROW, ROW, SEPARATOR, 1, ROW, ROW, ROW, ROW]
    together = [ROW, ROW, 1, SEPARATOR, ROW, ROW, ROW, ROW]
    assert common(names(apart, [CAT]), names(together, [CAT])) == 0


def test_two_images_of_one_block_change_it_both() -> None:
    ids = [ROW, 1, ROW, 2, 3, 4, 5, 6]
    cat, dog = replace(CAT, rows=1), replace(DOG, rows=1)
    found = [names(ids, spans)[0] for spans in ([cat, dog], [dog, cat], [cat, cat], [dog, dog])]
    assert len(set(found)) == 4


def test_behind_an_image_that_is_not_known_nothing_has_a_name() -> None:
    ids = [1] * 6 + [ROW] * 6 + [2] * 8
    unknown = replace(CAT, key="")
    assert names(ids, [unknown]) == names(ids, [CAT])[:1]
    assert len(names(ids[6:] + [ROW] * 6, [CAT, unknown])) == 3


def test_a_run_that_is_computed_as_a_whole_names_all_its_blocks() -> None:
    """Two images without anything between them: rows of the first have seen the second."""
    cat, dog = replace(CAT, rows=6), replace(DOG, rows=6)
    ids = [1, 2, *[ROW] * 12, 3, 4, *[ROW] * 6, 5, 6]

    def named(spans: list[ItemSpan], whole: bool) -> list[bytes]:
        items, rows = locate_items(ids, {ROW}, spans)
        runs = runs_of(rows) if whole else ()
        return BlockNames(ids, items, spans, rows, 4, runs).first(len(ids))

    for whole, same in ((False, 2), (True, 0)):
        assert common(named([cat, cat, cat], whole), named([cat, dog, cat], whole)) == same
        assert common(named([cat, cat, cat], whole), named([cat, cat, dog], whole)) == 4
    unknown = replace(cat, key="")
    assert len(named([cat, unknown, cat], False)) == 2
    assert len(named([cat, unknown, cat], True)) == 0
    assert len(named([cat, cat, unknown], True)) == 4


def test_an_answer_extends_the_names() -> None:
    ids = [1, 2, *[ROW] * 6, 3]
    items, rows = locate_items(ids, {ROW}, [CAT])
    growing = BlockNames(ids, items, [CAT], rows, 4)
    assert len(growing.first(100)) == 2
    for token in (7, 8, 9, 10):
        growing.extend((token,))
    assert growing.first(13) == names([*ids, 7, 8, 9, 10], [CAT])


piece = st.one_of(st.integers(0, 1), st.sampled_from(["cat", "dog"]))


@given(st.lists(piece, max_size=8), st.lists(piece, max_size=8), st.integers(1, 5))
def test_equal_as_far_as_the_content_is(
    one: list[int | str], other: list[int | str], size: int
) -> None:
    def prompt(parts: list[int | str]) -> tuple[list[int], list[ItemSpan], list[object]]:
        """Ids, spans, and of each token what it really is."""
        ids: list[int] = []
        spans: list[ItemSpan] = []
        truth: list[object] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
                truth.append(part)
            else:
                ids += [ROW, SEPARATOR, ROW, ROW]
                spans.append(ItemSpan(3, GRID, key=part))
                truth += [(part, 0), SEPARATOR, (part, 1), (part, 2)]
        return ids, spans, truth

    (a, spans_a, true_a), (b, spans_b, true_b) = prompt(one), prompt(other)
    shared = common(names(a, spans_a, size), names(b, spans_b, size))
    same = 0
    while same < min(len(a), len(b)) and true_a[same] == true_b[same]:
        same += 1
    assert shared == same // size


def test_no_name_is_made_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that nobody knows is looked up by one name, however long it is."""
    made: list[int] = []
    make = BlockNames._name
    monkeypatch.setattr(BlockNames, "_name", lambda self, n: (made.append(n), make(self, n))[1])
    lazy, blocks = BlockNames(range(40), [], [], [], 4), BlockManager(8, 4)
    assert blocks.find(lazy.each(40)) == ()
    assert made == [0]
    found = lazy.first(40)
    assert made == list(range(10)) and found == names(list(range(40)), [])
    for block, name in zip(blocks.grow("a", 12) or (), found, strict=False):
        blocks.name(block, name)
    again = BlockNames(range(40), [], [], [], 4)
    assert len(blocks.find(again.each(40))) == 3 and len(again._names) == 4
