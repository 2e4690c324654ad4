"""Lifecycles as tables: an Enum of states, an Enum of events, and what follows from the two.

The producer's side of a transfer is a *slot* (memory that is being filled and lent), the
consumer's side a *pull* (one ref on its way into the consumer's memory). Nothing here does I/O;
whoever owns a slot or a pull asks ``advance`` before acting. The diagrams in the documentation
are rendered from these tables by ``diagram``.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar


class IllegalTransition(RuntimeError):
    """The event cannot happen in this state: a bug of ours, never a fact about input."""


class SlotState(Enum):
    """Producer's slot."""

    FILLING = "filling"
    """Lent, some pieces may be readable, more are to come."""
    READY = "ready"
    """Every piece is readable."""
    FAILED = "failed"
    """It will never be complete; every claim is denied with the reason."""
    CLOSED = "closed"
    """No lease is left and the owner took the memory back."""


class SlotEvent(Enum):
    PIECES = "pieces"
    LAST = "last pieces"
    FAIL = "fail"
    CLOSE = "close"


class PullState(Enum):
    """Consumer's pull of one ref."""

    CLAIMED = "claimed"
    """Waiting for (more) pieces to be ready."""
    READING = "reading"
    """The transport may be writing into the destination."""
    VALIDATING = "validating"
    """Bytes are here; asking whether the lease covered the read."""
    IN_PLACE = "in place"
    """The producer's own memory is used; each use is validated before anything follows from it."""
    DONE = "done"
    FAILED = "failed"
    QUARANTINED = "quarantined"
    """Ended, but the transport may still write into the destination for a while."""


class PullEvent(Enum):
    READY = "ready"
    READ = "read"
    VALID = "valid"
    LAST = "last valid"
    MAP = "ready, mapped here"
    RELEASE = "released"
    FAIL = "denied, expired, lost or cancelled"
    UNSAFE = "read not drained"


S = TypeVar("S", bound=Enum)
E = TypeVar("E", bound=Enum)

SLOT: Mapping[tuple[SlotState, SlotEvent], SlotState] = {
    (SlotState.FILLING, SlotEvent.PIECES): SlotState.FILLING,
    (SlotState.FILLING, SlotEvent.LAST): SlotState.READY,
    (SlotState.FILLING, SlotEvent.FAIL): SlotState.FAILED,
    (SlotState.FILLING, SlotEvent.CLOSE): SlotState.CLOSED,
    (SlotState.READY, SlotEvent.CLOSE): SlotState.CLOSED,
    (SlotState.FAILED, SlotEvent.CLOSE): SlotState.CLOSED,
}

PULL: Mapping[tuple[PullState, PullEvent], PullState] = {
    (PullState.CLAIMED, PullEvent.READY): PullState.READING,
    (PullState.CLAIMED, PullEvent.LAST): PullState.DONE,
    (PullState.CLAIMED, PullEvent.MAP): PullState.IN_PLACE,
    (PullState.CLAIMED, PullEvent.FAIL): PullState.FAILED,
    (PullState.READING, PullEvent.READ): PullState.VALIDATING,
    (PullState.READING, PullEvent.FAIL): PullState.FAILED,
    (PullState.READING, PullEvent.UNSAFE): PullState.QUARANTINED,
    (PullState.VALIDATING, PullEvent.VALID): PullState.CLAIMED,
    (PullState.VALIDATING, PullEvent.FAIL): PullState.FAILED,
    (PullState.IN_PLACE, PullEvent.VALID): PullState.IN_PLACE,
    (PullState.IN_PLACE, PullEvent.RELEASE): PullState.DONE,
    (PullState.IN_PLACE, PullEvent.FAIL): PullState.FAILED,
}


def advance(table: Mapping[tuple[S, E], S], state: S, event: E) -> S:
    """The state that follows. Raises IllegalTransition when the table has none."""
    try:
        return table[state, event]
    except KeyError:
        raise IllegalTransition(f"{event.name} in state {state.name}") from None


def diagram(table: Mapping[tuple[S, E], S], start: S) -> str:
    """The table as a mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {start.name}"]
    lines += [f"    {a.name} --> {b.name}: {event.value}" for (a, event), b in table.items()]
    sources = {a for a, _ in table}
    ends = sorted({b.name for b in table.values() if b not in sources})
    return "\n".join([*lines, *(f"    {name} --> [*]" for name in ends)]) + "\n"
