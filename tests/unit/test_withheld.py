"""Results that wait for their rows to be proven right, compared with a list."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from triptych.engine.withheld import Withheld


def test_in_order_and_only_when_all_before_are_proven() -> None:
    withheld: Withheld[str] = Withheld()
    assert not withheld.waits("r")
    first = withheld.hold("r", "a", [0])
    assert withheld.hold("r", "b", []) == 0  # read nothing borrowed, follows from what did
    third = withheld.hold("r", "c", [0, 1])
    assert withheld.waits("r") and not withheld.waits("other")
    assert list(withheld.prove("r", third)) == []
    assert list(withheld.prove("other", first)) == []
    assert list(withheld.prove("r", first)) == ["a", "b", "c"]
    assert not withheld.waits("r")
    assert list(withheld.prove("r", first)) == []


def test_rolling_back_forgets_the_step_that_read_it_and_what_follows() -> None:
    withheld: Withheld[str] = Withheld()
    first = withheld.hold("r", "a", [0])
    second = withheld.hold("r", "b", [1])
    withheld.hold("r", "c", [])
    assert withheld.roll_back("r", 7) is None
    assert withheld.roll_back("r", 1) == "b"
    again = withheld.hold("r", "b again", [1])
    assert list(withheld.prove("r", second)) == []  # was asked about rows that were wrong
    assert list(withheld.prove("r", first)) == ["a"]
    assert list(withheld.prove("r", second)) == []
    assert list(withheld.prove("r", again)) == ["b again"]


def test_forgotten_with_its_request() -> None:
    withheld: Withheld[str] = Withheld()
    serial = withheld.hold("r", "a", [0])
    withheld.forget("r")
    withheld.forget("r")
    assert not withheld.waits("r")
    assert list(withheld.prove("r", serial)) == []
    assert withheld.roll_back("r", 0) is None


steps = st.lists(
    st.one_of(
        st.tuples(st.just("hold"), st.frozensets(st.integers(0, 2), max_size=2)),
        st.tuples(st.just("prove"), st.integers(0, 20)),
        st.tuples(st.just("roll back"), st.integers(0, 2)),
    ),
    max_size=30,
)


@given(steps)
def test_nothing_unproven_is_seen(actions: list[tuple[str, object]]) -> None:
    withheld: Withheld[int] = Withheld()
    kept: list[list[object]] = []  # [number, items, serial, proven]
    seen: list[int] = []
    numbers = 0
    serials = [0]
    for action, value in actions:
        if action == "hold":
            assert isinstance(value, frozenset)
            numbers += 1
            serial = withheld.hold("r", numbers, sorted(value))
            serials.append(serial)
            kept.append([numbers, value, serial, not value])
        elif action == "prove":
            assert isinstance(value, int)
            serial = serials[value % len(serials)]
            for entry in kept:
                entry[3] = entry[3] or entry[2] == serial
            expected = []
            while kept and kept[0][3]:
                expected.append(kept.pop(0)[0])
            found = list(withheld.prove("r", serial))
            assert found == expected
            seen += found
        else:
            first = next((n for n, e in enumerate(kept) if value in e[1]), None)  # type: ignore[operator]
            assert withheld.roll_back("r", value) == (  # type: ignore[arg-type]
                None if first is None else kept[first][0]
            )
            kept = kept if first is None else kept[:first]
        assert withheld.waits("r") == bool(kept)
    assert seen == sorted(set(seen))
