import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.router.placement import (
    BOUND,
    Candidate,
    answering_roles,
    least_loaded,
    missing_roles,
    prefer,
    spread_items,
)

DIGESTS = st.lists(st.text("0123456789abcdef", min_size=8, max_size=8), max_size=40)


def encoders(*loads: int) -> list[Candidate]:
    return [Candidate(f"encoder-{i}", load) for i, load in enumerate(loads)]


@given(DIGESTS, st.lists(st.integers(0, 20), min_size=1, max_size=6))
def test_every_image_has_an_encoder_and_none_more_than_its_share(
    digests: list[str], loads: list[int]
) -> None:
    candidates = encoders(*loads)
    placed = spread_items(digests, candidates)
    assert len(placed) == len(digests)
    after = {c.worker_id: c.load + placed.count(c.worker_id) for c in candidates}
    most = BOUND * sum(after.values()) / len(candidates) + 1
    for candidate in candidates:
        assert after[candidate.worker_id] <= max(candidate.load, most)


@given(st.text(min_size=1), st.integers(2, 6))
def test_the_same_image_goes_to_the_same_encoder(digest: str, n: int) -> None:
    first = spread_items([digest], encoders(*[0] * n))
    assert spread_items([digest], list(reversed(encoders(*[0] * n)))) == first


def test_a_worker_that_goes_moves_only_its_own_images() -> None:
    digests = [f"{i:064x}" for i in range(200)]
    before = {d: spread_items([d], encoders(0, 0, 0, 0))[0] for d in digests}
    after = {d: spread_items([d], encoders(0, 0, 0))[0] for d in digests}
    for digest in digests:
        if before[digest] != "encoder-3":
            assert after[digest] == before[digest]
    assert {before[d] for d in digests} == {f"encoder-{i}" for i in range(4)}


def test_four_images_use_both_of_two_idle_encoders() -> None:
    for seed in range(50):
        placed = spread_items([f"{seed}-{i}" for i in range(4)], encoders(0, 0))
        assert 1 <= placed.count("encoder-0") <= 3


def test_least_loaded_is_the_least_loaded_and_deterministic() -> None:
    assert least_loaded(encoders(3, 1, 2)) == "encoder-1"
    assert least_loaded(encoders(2, 2)) == least_loaded(list(reversed(encoders(2, 2))))


def test_those_that_failed_come_last() -> None:
    assert prefer(["a", "b"], {"a"}) == ["b"]
    assert prefer(["a"], {"a"}) == ["a"]


@pytest.mark.parametrize(
    ("topology", "present", "roles", "missing"),
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
    topology: str, present: list[str], roles: tuple[str, ...], missing: list[str]
) -> None:
    assert answering_roles(topology, present) == roles
    assert missing_roles(topology, present) == missing
