"""Where the time of a load's requests went, from the timelines that the router keeps. Pure."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from rich import box
from rich.table import Table

Span = dict[str, Any]
"""As ``GET /v1/requests/{id}/timeline`` has it."""


@dataclass(frozen=True)
class Timeline:
    """One request. Wall-clock seconds since the epoch, all on one machine's clock."""

    sent: float
    first: float
    """Its first text was at the client."""
    end: float
    arrived: float
    """At the router; the spans' milliseconds count from here."""
    spans: Sequence[Span]


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """What one role did under one name. Medians over the requests, in ms since they were sent."""

    who: str
    what: str
    count: float
    """Spans of a request."""
    start: float
    """Of the first of them."""
    end: float
    """Of the last."""
    busy: float
    """All together."""
    one: float
    """A single one."""


def phases(timelines: Sequence[Timeline]) -> tuple[Phase, ...]:
    """In the order in which they begin."""
    found: dict[tuple[str, str], list[list[tuple[float, float]]]] = defaultdict(list)
    for timeline in timelines:
        own: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
        for who, what, start, end in _stretches(timeline):
            own[who, what].append((start, end))
        for name, stretches in own.items():
            found[name].append(stretches)
    made = (_phase(*name, requests) for name, requests in found.items())
    return tuple(sorted(made, key=lambda phase: (phase.start, phase.end)))


def _stretches(timeline: Timeline) -> list[tuple[str, str, float, float]]:
    """(who, what, start, end) in ms since the request was sent."""
    began = 1000 * (timeline.arrived - timeline.sent)
    found = [
        ("client", "first text", 0.0, 1000 * (timeline.first - timeline.sent)),
        ("client", "whole answer", 0.0, 1000 * (timeline.end - timeline.sent)),
        ("client", "until the router sees it", 0.0, began),
    ]
    encoded, landed = {}, {}
    for span in timeline.spans:
        start, end = began + span["start_ms"], began + span["end_ms"]
        found.append((span["role"], _what(span), start, end))
        if span["name"] == "encode":
            encoded[span["item"]] = end
        if span["name"] == "read":
            landed[span["item"]] = end
    for item in encoded.keys() & landed.keys():
        found.append(("hand-off", "forward done to rows landed", encoded[item], landed[item]))
    first = [began + span["end_ms"] for span in timeline.spans if span["name"] == "first_token"]
    if landed and first:
        found.append(("prefill", "last rows landed to first token", max(landed.values()), first[0]))
    return found


def _what(span: Span) -> str:
    """A span's name, with what tells apart two of one name in one role."""
    if span["name"] == "queue" and span["note"]:
        return f"queue {span['note']}"
    return f"{span['name']} ({span['transport']})" if span["transport"] else str(span["name"])


def _phase(who: str, what: str, requests: Sequence[Sequence[tuple[float, float]]]) -> Phase:
    return Phase(
        who=who,
        what=what,
        count=statistics.mean(len(stretches) for stretches in requests),
        start=statistics.median(min(start for start, _ in each) for each in requests),
        end=statistics.median(max(end for _, end in each) for each in requests),
        busy=statistics.median(sum(end - start for start, end in each) for each in requests),
        one=statistics.median(end - start for each in requests for start, end in each),
    )


def across(found: Mapping[str, Sequence[Phase]]) -> Table:
    """The phases of several arrangements, by name: when each ended, and its spans together."""
    shown = Table(box=box.MARKDOWN)
    for name in ("who", "what"):
        shown.add_column(name, no_wrap=True)
    for name in found:
        shown.add_column(f"{name}: until, took", justify="right")
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for name, each in found.items():
        for phase in each:
            text = f"{phase.end:.1f}, {phase.busy:.1f}"
            cells.setdefault((phase.who, phase.what), {})[name] = text
    for key, own in cells.items():
        shown.add_row(*key, *(own.get(name, "") for name in found))
    return shown


def table(found: Sequence[Phase]) -> Table:
    shown = Table(box=box.MARKDOWN)
    for name in ("who", "what"):
        shown.add_column(name, no_wrap=True)
    for name in ("spans", "from ms", "to ms", "together ms", "one ms"):
        shown.add_column(name, justify="right", no_wrap=True)
    for phase in found:
        times = (f"{ms:.1f}" for ms in (phase.start, phase.end, phase.busy, phase.one))
        shown.add_row(phase.who, phase.what, f"{phase.count:.3g}", *times)
    return shown
