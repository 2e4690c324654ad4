"""The encoder's cache, compared with a list that is searched."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from triptych.encoder.cache import EmbeddingCache


def test_equal_keys_share_a_slot_also_while_it_is_filled() -> None:
    cache = EmbeddingCache()
    assert cache.find("a") is None
    cache.add("a", 1)
    assert cache.find("a") == 1
    cache.filled(1)
    assert cache.find("a") == 1


def test_only_full_and_unpinned_slots_go_oldest_first() -> None:
    cache = EmbeddingCache()
    for slot, key in enumerate("abcd"):
        cache.add(key, slot)
    pinned = {0, 1, 2, 3}
    assert cache.evict(pinned.__contains__) is None
    for slot in (0, 1, 2):
        cache.filled(slot)
    assert cache.evict(pinned.__contains__) is None
    pinned = {2}
    cache.find("a")
    assert [cache.evict(pinned.__contains__) for _ in range(3)] == [1, 0, None]
    assert cache.find("a") is None
    assert len(cache) == 2


def test_a_removed_slot_leaves_its_key_free() -> None:
    cache = EmbeddingCache()
    cache.add("a", 1)
    cache.remove(1)
    cache.remove(1)
    cache.add("a", 2)
    cache.remove(1)
    assert cache.find("a") == 2


actions = st.lists(
    st.tuples(
        st.sampled_from(["use", "filled", "pin", "unpin", "remove", "evict"]), st.integers(0, 5)
    )
)


@given(actions)
def test_like_a_list_that_is_searched(steps: list[tuple[str, int]]) -> None:
    cache = EmbeddingCache()
    model: list[dict[str, object]] = []  # least recently used first
    next_slot = 100
    for action, number in steps:
        key = f"k{number}"
        known = next((entry for entry in model if entry["key"] == key), None)
        if action == "use":
            assert cache.find(key) == (known and known["slot"])
            if known is None:
                cache.add(key, next_slot)
                known = {"key": key, "slot": next_slot, "full": False, "pinned": True}
                next_slot += 1
            else:
                model.remove(known)
            model.append(known)
        elif action == "evict":
            free = next((e for e in model if e["full"] and not e["pinned"]), None)
            pinned = {e["slot"] for e in model if e["pinned"]}
            assert cache.evict(pinned.__contains__) == (free and free["slot"])
            if free:
                model.remove(free)
        elif known is not None and action in ("pin", "unpin"):
            known["pinned"] = action == "pin"
        elif known is not None:
            getattr(cache, action)(known["slot"])
            if action == "remove":
                model.remove(known)
            else:
                known["full"] = True
    assert len(cache) == len(model)
