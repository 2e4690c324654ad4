import random

import pytest

from triptych.request import ItemMeta
from triptych.router.placement import PREFIX_TOKENS
from triptych.router.prefixes import prefixes

ROW, VIDEO_ROW = 7, 8


def image(key: str, rows: int) -> ItemMeta:
    return ItemMeta(
        key=key, text="", rows=rows, grid=None, planes=1, width=8, dtype="float32", kind="image"
    )


def text(n: int, seed: int = 0) -> list[int]:
    return [random.Random(seed * 10_000 + i).randrange(100, 10_000) for i in range(n)]


def names(tokens: list[int], *items: ItemMeta) -> list[str]:
    return prefixes(tokens, items, (ROW, VIDEO_ROW))


def test_one_name_for_each_whole_block() -> None:
    for n in (0, 1, PREFIX_TOKENS - 1, PREFIX_TOKENS, 5 * PREFIX_TOKENS + 3):
        assert len(names(text(n))) == n // PREFIX_TOKENS


def test_a_later_turn_begins_with_the_earlier_ones_names() -> None:
    first = [*text(100), *[ROW] * 300, *text(60, 1)]
    earlier = names(first, image("a", 300))
    second = [*first, *text(40, 2), *[ROW] * 200, *text(50, 3)]
    later = names(second, image("a", 300), image("b", 200))
    assert later[: len(earlier)] == earlier and len(later) > len(earlier)


def test_another_token_or_another_image_is_another_name_from_there_on() -> None:
    tokens = [*text(300), *[ROW] * 300, *text(300, 1)]
    ours = names(tokens, image("a", 300))
    theirs = names(tokens, image("b", 300))
    differ = [a != b for a, b in zip(ours, theirs, strict=True)]
    assert differ == [(n + 1) * PREFIX_TOKENS > 300 for n in range(len(ours))]
    changed = list(tokens)
    changed[PREFIX_TOKENS] += 1
    other = names(changed, image("a", 300))
    assert other[0] == ours[0] and not set(other[1:]) & set(ours[1:])


@pytest.mark.parametrize("between", [0, 1, 200])
def test_images_count_where_they_stand(between: int) -> None:
    """Rows of an image may have other tokens between them, and images may follow at once."""
    block = [*[ROW] * 10, 5] * 30
    tokens = [*block, *text(between), *[VIDEO_ROW] * 300, *text(PREFIX_TOKENS)]
    one = names(tokens, image("a", 300), image("b", 300))
    other = names(tokens, image("a", 300), image("c", 300))
    same = [a == b for a, b in zip(one, other, strict=True)]
    second_begins = len(block) + between
    assert same == [(n + 1) * PREFIX_TOKENS <= second_begins for n in range(len(one))]
    assert names(tokens, image("b", 300), image("a", 300))[2] != one[2]
