"""What happened to each of the last requests, told by all roles, on one clock."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from triptych.observe import metrics
from triptych.request import Span

KEPT = 1000
"""Requests remembered."""
MOST_SPANS = 10_000
"""Spans kept of one request."""


@dataclass
class Timeline:
    arrived: float
    """Wall clock, seconds since the epoch."""
    spans: list[Span] = field(default_factory=list)


class Timelines:
    """Spans by request id. The oldest request is forgotten first."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._timelines: OrderedDict[str, Timeline] = OrderedDict()

    def open(self, request_id: str, arrived: float) -> None:
        self._timelines[request_id] = Timeline(arrived)
        while len(self._timelines) > self._kept:
            self._timelines.popitem(last=False)

    def share(self, request_id: str, other_id: str) -> None:
        """Spans that name ``other_id`` belong to the timeline of ``request_id`` too."""
        if (timeline := self._timelines.get(request_id)) is not None:
            self._timelines[other_id] = timeline

    def add(self, request_id: str, spans: Iterable[Span]) -> None:
        """Spans of a request that is not remembered are dropped."""
        timeline = self._timelines.get(request_id)
        if timeline is not None and len(timeline.spans) < MOST_SPANS:
            timeline.spans.extend(spans)

    def own(
        self,
        request_id: str,
        name: str,
        start: float,
        *,
        item: int = -1,
        nbytes: int = 0,
        note: str = "",
    ) -> None:
        """A span of the router itself, which ends now."""
        end = time.time()
        span = Span(
            name=name,
            start=start,
            end=end,
            role="router",
            pid=os.getpid(),
            item=item,
            nbytes=nbytes,
            note=note,
        )
        self.add(request_id, (span,))
        metrics.record_span("router", name, end - start, 0, "")

    def describe(self, request_id: str) -> dict[str, Any] | None:
        """JSON of ``GET /v1/requests/{id}/timeline``: times in ms since the request arrived."""
        timeline = self._timelines.get(request_id)
        if timeline is None:
            return None
        spans = sorted(timeline.spans, key=lambda span: (span.start, span.end))
        return {
            "request_id": request_id,
            "arrived": timeline.arrived,
            "spans": [_describe(span, timeline.arrived) for span in spans],
        }


def _describe(span: Span, arrived: float) -> dict[str, Any]:
    return {
        "name": span.name,
        "role": span.role,
        "pid": span.pid,
        "item": span.item,
        "start_ms": round((span.start - arrived) * 1000, 3),
        "end_ms": round((span.end - arrived) * 1000, 3),
        "nbytes": span.nbytes,
        "transport": span.transport,
        "note": span.note,
    }
