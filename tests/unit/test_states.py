from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import pytest

from triptych.states import (
    PULL,
    SLOT,
    IllegalTransition,
    PullEvent,
    PullState,
    SlotEvent,
    SlotState,
    advance,
    diagram,
)

TABLES: list[tuple[Mapping[Any, Any], type[Enum], type[Enum], Enum]] = [
    (SLOT, SlotState, SlotEvent, SlotState.FILLING),
    (PULL, PullState, PullEvent, PullState.CLAIMED),
]


@pytest.mark.parametrize(("table", "states", "events", "start"), TABLES)
def test_every_pair_either_follows_the_table_or_raises(
    table: Mapping[Any, Any], states: type[Enum], events: type[Enum], start: Enum
) -> None:
    for state in states:
        for event in events:
            if (state, event) in table:
                assert advance(table, state, event) is table[state, event]
            else:
                with pytest.raises(IllegalTransition, match=event.name):
                    advance(table, state, event)


@pytest.mark.parametrize(("table", "states", "events", "start"), TABLES)
def test_every_state_is_reached_and_every_event_used(
    table: Mapping[Any, Any], states: type[Enum], events: type[Enum], start: Enum
) -> None:
    reached, size = {start}, 0
    while len(reached) > size:
        size = len(reached)
        reached |= {after for (before, _), after in table.items() if before in reached}
    assert reached == set(states)
    assert {event for _, event in table} == set(events)


def test_pieces_are_used_only_after_validation() -> None:
    into = {before for (before, _), after in PULL.items() if after is PullState.DONE}
    assert into == {PullState.CLAIMED, PullState.IN_PLACE}
    # What is used in place is validated after each use, and ends by being given back.
    assert PULL[PullState.IN_PLACE, PullEvent.RELEASE] is PullState.DONE
    assert (PullState.IN_PLACE, PullEvent.LAST) not in PULL
    after_read = {before for (before, _), after in PULL.items() if after is PullState.CLAIMED}
    assert after_read == {PullState.VALIDATING}


def test_quarantine_follows_only_a_read() -> None:
    sources = {before for (before, _), after in PULL.items() if after is PullState.QUARANTINED}
    assert sources == {PullState.READING}


def test_diagram_draws_every_transition_once() -> None:
    text = diagram(SLOT, SlotState.FILLING)
    lines = text.splitlines()
    assert lines[:2] == ["stateDiagram-v2", "    [*] --> FILLING"]
    assert "    FILLING --> READY: last pieces" in lines
    assert lines[-1] == "    CLOSED --> [*]"
    assert len(lines) == 2 + len(SLOT) + 1
