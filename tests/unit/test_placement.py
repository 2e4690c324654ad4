import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.router.placement import (
    BOUND,
    PREFIX_TOKENS,
    Candidate,
    Item,
    Recent,
    answering_roles,
    apart,
    estimated_patches,
    excess,
    place_decode,
    place_prompt,
    prefer,
    shortfall,
    spread_items,
)

DIGESTS = st.text("0123456789abcdef", min_size=8, max_size=8)
ITEMS = st.lists(st.builds(Item, DIGESTS, st.integers(1, 100)), max_size=40)
LOADS = st.lists(st.integers(0, 200), min_size=1, max_size=6)


def encoders(*loads: int) -> list[Candidate]:
    return [Candidate(f"encoder-{i}", load) for i, load in enumerate(loads)]


def images(*patches: int) -> list[Item]:
    return [Item(f"{n:064x}", cost) for n, cost in enumerate(patches)]


def finish(items: list[Item], placed: list[str], encoders: list[Candidate]) -> int:
    """When the last of the items is ready, if each encoder works off what it has in turn."""
    loads = {encoder.worker_id: encoder.load for encoder in encoders}
    for item, worker_id in zip(items, placed, strict=True):
        loads[worker_id] += item.patches
    return max(loads[worker_id] for worker_id in placed)


# ------------------------------------------------------------------ encoders


@given(ITEMS, LOADS)
def test_nobody_is_given_an_image_that_another_would_have_much_sooner(
    items: list[Item], loads: list[int]
) -> None:
    candidates = encoders(*loads)
    placed = spread_items(items, candidates)
    assert len(placed) == len(items)
    now = {c.worker_id: c.load for c in candidates}
    seen: dict[str, str] = {}
    for item, chosen in sorted(zip(items, placed, strict=True), key=lambda pair: -pair[0].patches):
        if item.content in seen:
            assert chosen == seen[item.content]  # whose forward serves both
            continue
        seen[item.content] = chosen
        assert now[chosen] + item.patches <= BOUND * (min(now.values()) + item.patches)
        now[chosen] += item.patches


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=6),
    st.lists(st.integers(0, 60), min_size=1, max_size=3),
)
def test_a_request_is_ready_about_as_soon_as_it_can_be(costs: list[int], loads: list[int]) -> None:
    """Beside every way there is to spread its images."""
    items, candidates = images(*costs), encoders(*loads)
    names = [candidate.worker_id for candidate in candidates]
    best = min(finish(items, list(ways), candidates) for ways in product(names, repeat=len(items)))
    assert finish(items, spread_items(items, candidates), candidates) <= 2 * BOUND * best


def test_images_are_spread_when_that_is_sooner() -> None:
    for n in (2, 4, 8):
        items = images(*[100] * n)
        placed = spread_items(items, encoders(0, 0))
        assert placed.count("encoder-0") == placed.count("encoder-1") == n // 2
    one_large = images(80, 20, 20, 20, 20)
    placed = spread_items(one_large, encoders(0, 0))
    assert finish(one_large, placed, encoders(0, 0)) <= BOUND * 80


def test_images_stay_together_when_the_other_encoder_is_busy() -> None:
    placed = spread_items(images(10, 10, 10), encoders(0, 500))
    assert placed == ["encoder-0"] * 3


def test_patches_count_and_not_images() -> None:
    """One large image there is more work than five small ones."""
    items = images(1000, 10, 10, 10, 10, 10)
    large, *small = spread_items(items, encoders(0, 0))
    assert set(small) == {"encoder-0", "encoder-1"} - {large}


@given(DIGESTS, st.integers(2, 6))
def test_the_same_image_goes_to_the_same_encoder(digest: str, n: int) -> None:
    item = Item(digest, 7)
    first = spread_items([item], encoders(*[0] * n))
    assert spread_items([item], list(reversed(encoders(*[0] * n)))) == first
    assert spread_items([item, item], encoders(*[0] * n)) == first * 2


def test_an_image_goes_where_it_has_been_unless_that_takes_longer_than_encoding_it() -> None:
    (item,) = images(100)
    for holder in ("encoder-0", "encoder-1"):

        def candidates(load: int, holder: str = holder) -> list[Candidate]:
            return [
                Candidate(
                    w, load if w == holder else 0, known={item.content} if w == holder else ()
                )
                for w in ("encoder-0", "encoder-1")
            ]

        for load in (0, 50, 100):
            assert spread_items([item], candidates(load)) == [holder]
        assert spread_items([item], candidates(126)) != [holder]


def test_a_worker_that_goes_moves_only_its_own_images() -> None:
    items = [Item(f"{i:064x}", 5) for i in range(200)]
    before = {i: spread_items([i], encoders(0, 0, 0, 0))[0] for i in items}
    after = {i: spread_items([i], encoders(0, 0, 0))[0] for i in items}
    for item in items:
        if before[item] != "encoder-3":
            assert after[item] == before[item]
    assert {before[i] for i in items} == {f"encoder-{i}" for i in range(4)}


def test_what_an_item_costs() -> None:
    assert estimated_patches(500_000, (1920, 1080)) == 1920 * 1080 // 196
    assert estimated_patches(500_000, (1920, 1080), "low") == 512 * 512 // 196
    assert estimated_patches(10, (1, 1)) == estimated_patches(10, (1, 1), "low") == 1
    assert estimated_patches(20, None) == 1
    hour, minute = estimated_patches(60 << 20, None), estimated_patches(1 << 20, None)
    assert hour == pytest.approx(60 * minute, rel=0.01)


# ------------------------------------------------------------------ the answer


def test_a_prompt_goes_where_least_is_outstanding() -> None:
    assert place_prompt(10, 10, [], encoders(30, 10, 20)) == "encoder-1"
    assert place_prompt(10, 10, [], list(reversed(encoders(20, 20)))) == "encoder-0"


def test_what_a_worker_has_computed_before_counts_as_done() -> None:
    prefixes = ["1", "2", "3"]
    n_prompt = 3 * PREFIX_TOKENS + 5

    def choose(load: int, *known: str) -> str:
        others = [Candidate("a", 0), Candidate("b", load, known=known)]
        return place_prompt(n_prompt, n_prompt, prefixes, others)

    assert choose(2 * PREFIX_TOKENS - 1, "1", "2") == "b"
    assert choose(2 * PREFIX_TOKENS + 1, "1", "2") == "a"
    assert choose(3 * PREFIX_TOKENS - 1, "3") == "b"  # the shorter ones were forgotten
    assert choose(1, "another chat's") == "a"


def test_room_in_the_kv_cache_comes_before_everything() -> None:
    full = Candidate("full", 90, room=100, known=("1",))
    free = Candidate("free", 500, room=1000)
    assert place_prompt(PREFIX_TOKENS, 11, ["1"], [full, free]) == "free"
    assert place_prompt(PREFIX_TOKENS, 10, ["1"], [full, free]) == "full"
    assert place_prompt(10, 2000, [], [full, free]) == "full"  # neither has any: the shorter wait


def test_decode_goes_by_free_tokens() -> None:
    small, large = Candidate("small", 0, room=100), Candidate("large", 500, room=1000)
    assert place_decode([small, large]) == "large"
    assert place_decode([small, Candidate("large", 950, room=1000)]) == "small"
    assert place_decode(encoders(3, 1, 2)) == "encoder-1"
    assert place_decode(list(reversed(encoders(2, 2)))) == "encoder-0"


def test_tokens_over_the_backlog() -> None:
    busy = Candidate("w", 700, room=100)
    assert excess(100, busy, 8.0) == 0
    assert excess(150, busy, 8.0) == 50
    assert excess(150, busy, math.inf) < 0
    assert excess(10**6, Candidate("w", 0, room=100), 8.0) == 0  # idle
    assert excess(10**6, Candidate("w", 700), 8.0) == 0  # its memory is not known


@given(st.lists(st.text("abcdef", min_size=1, max_size=2)), st.integers(1, 8))
def test_what_is_remembered_is_what_came_last(keys: list[str], most: int) -> None:
    recent = Recent(most)
    for key in keys:
        recent.add([key])
    last = list(dict.fromkeys(reversed(keys)))
    assert len(recent) == min(most, len(last))
    assert all(key in recent for key in last[:most])
    assert not any(key in recent for key in last[most:])


# ------------------------------------------------------------------ roles


def test_those_that_failed_come_last() -> None:
    assert prefer(["a", "b"], {"a"}) == ["b"]
    assert prefer(["a"], {"a"}) == ["a"]


ONE_EACH = {"encoder": 1, "prefill": 1, "decode": 1, "language": 1}


@pytest.mark.parametrize(
    ("topology", "present", "roles", "lacking"),
    [
        ("E/P/D", ["encoder", "prefill", "decode"], ("prefill", "decode"), []),
        ("E/P/D", ["encoder", "language"], ("prefill", "decode"), ["prefill", "decode"]),
        ("E/PD", ["encoder"], ("language",), ["language"]),
        ("EPD", ["encoder", "language"], ("language",), []),
        ("any", ["encoder", "prefill", "decode"], ("prefill", "decode"), []),
        ("any", ["encoder", "prefill", "language"], ("language",), []),
        ("any", ["encoder", "decode"], ("prefill", "decode"), ["prefill"]),
        ("any", [], ("language",), ["encoder", "language"]),
    ],
)
def test_what_a_topology_needs(
    topology: str, present: list[str], roles: tuple[str, ...], lacking: list[str]
) -> None:
    assert answering_roles(topology, present) == roles
    assert shortfall(topology, ONE_EACH, dict.fromkeys(present, 1)) == lacking


def test_fewer_than_asked_for_is_a_shortfall() -> None:
    asked = {"encoder": 3, "prefill": 2, "decode": 1, "language": 9}
    present = {"encoder": 1, "decode": 1}
    assert shortfall("E/P/D", asked, present) == ["2 more of role encoder", "prefill"]
    assert shortfall("E/P/D", asked, {"encoder": 3, "prefill": 4, "decode": 1}) == []


def test_workers_that_cannot_read_each_other() -> None:
    both, shm = ("shm", "http"), ("shm",)
    producers = [("e-0", both), ("e-1", ("http",))]
    assert apart([("p-0", both)], producers) == []
    assert apart([("p-0", both), ("p-1", shm)], producers) == ["p-1 reads by shm, e-1 offers http"]
    assert apart([], producers) == apart([("p-0", shm)], []) == []
