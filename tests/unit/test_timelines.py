import time

import pytest

from triptych.request import Span
from triptych.router.timelines import Timelines


def span(name: str, start: float, end: float, **more: object) -> Span:
    return Span(name=name, start=start, end=end, **more)  # type: ignore[arg-type]


def test_spans_of_all_roles_in_order_in_ms_since_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 100.25)
    timelines = Timelines()
    timelines.open("r", 100.0)
    timelines.add("r", [span("read", 100.5, 100.75, role="prefill", item=1, nbytes=7)])
    timelines.own("r", "fetch", 100.001, item=1, nbytes=9)
    found = timelines.describe("r")
    assert found is not None
    assert found["request_id"] == "r"
    assert [s["name"] for s in found["spans"]] == ["fetch", "read"]
    fetch, read = found["spans"]
    assert (fetch["role"], fetch["start_ms"], fetch["end_ms"], fetch["item"]) == (
        "router", 1.0, 250.0, 1,
    )  # fmt: skip
    assert (read["role"], read["start_ms"], read["nbytes"], read["pid"]) == ("prefill", 500.0, 7, 0)


def test_another_try_shares_the_timeline() -> None:
    timelines = Timelines()
    timelines.open("r", 0.0)
    timelines.share("r", "r-2")
    timelines.add("r-2", [span("read", 1.0, 2.0)])
    timelines.share("unknown", "unknown-2")
    timelines.add("unknown-2", [span("read", 1.0, 2.0)])
    found = timelines.describe("r")
    assert found is not None and len(found["spans"]) == 1
    assert timelines.describe("unknown-2") is None


def test_the_oldest_requests_are_forgotten() -> None:
    timelines = Timelines(kept=3)
    for i in range(5):
        timelines.open(f"r{i}", 0.0)
        timelines.share(f"r{i}", f"r{i}")
    assert timelines.describe("r1") is None
    assert timelines.describe("r2") is not None
    timelines.add("r0", [span("late", 0.0, 1.0)])
    assert timelines.describe("r0") is None
