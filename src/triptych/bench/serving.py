"""What ``bench serve`` and ``bench topologies`` write and show."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich import box
from rich.table import Table

from triptych import __version__
from triptych.bench.figures import Part, Spread, Summary
from triptych.bench.phases import Phase
from triptych.errors import ConfigError


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One load on one arrangement."""

    arrangement: str
    """Its name; of ``bench serve`` the URL or the label."""
    row: str
    """Name of the load, or of the loads at once."""
    stream: str = ""
    """Which of several loads at once."""
    load: dict[str, Any]
    """As ``config.Load``."""
    devices: int
    """That the arrangement computes on; 0: unknown."""
    cut: bool = False
    """The limit ended it."""
    summary: Summary
    phases: tuple[Phase, ...] = ()
    """Medians of what the servers' timelines tell."""

    @property
    def name(self) -> str:
        return ": ".join(part for part in (self.row, self.stream) if part)


class ServingReport(msgspec.Struct, frozen=True, kw_only=True):
    triptych: str
    python: str
    cpus: int
    machine: dict[str, str]
    """Devices and what they can do at best, where that was measured."""
    settings: dict[str, Any]
    """What was asked for."""
    failed: dict[str, str]
    """Arrangements that could not be measured, and why."""
    rows: tuple[Row, ...]


def report(settings: dict[str, Any]) -> ServingReport:
    """One without rows, of this machine now."""
    return ServingReport(
        triptych=__version__,
        python=platform.python_version(),
        cpus=len(os.sched_getaffinity(0)),
        machine={},
        settings=settings,
        failed={},
        rows=(),
    )


def plain(value: Any) -> Any:
    """A configuration as JSON knows it; what is infinite as a word."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if is_dataclass(value) and not isinstance(value, type):
        return plain({item.name: getattr(value, item.name) for item in fields(value)})
    return str(value) if isinstance(value, Path) or value == math.inf else value


def save(found: ServingReport, path: Path) -> None:
    """The file is the old or the new one, whenever this process ends. Raises ConfigError."""
    text = msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n"
    beside = path.with_name(path.name + ".new")
    try:
        beside.write_bytes(text)
        beside.replace(path)
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}") from exc


def load(path: Path) -> ServingReport:
    """Raises ConfigError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=ServingReport)
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}") from exc
    except msgspec.DecodeError as exc:
        raise ConfigError(f"{path} is not a file of bench serve or topologies: {exc}") from exc


def check_out(path: Path | None) -> None:
    """Raises ConfigError before minutes of measuring, not after."""
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no such folder")


# ------------------------------------------------------------------ tables


def details(row: Row) -> Table:
    """Everything about one row, the whole of it beside its steady state."""
    shown = Table(box=box.MARKDOWN)
    parts = {"whole": row.summary.whole, "steady state": row.summary.steady}
    parts = {name: part for name, part in parts.items() if part is not None}
    shown.add_column("figure", no_wrap=True)
    for name in parts:
        shown.add_column(name, justify="right", no_wrap=True)
    cells = [_details(part) for part in parts.values() if part is not None]
    for name in cells[0]:
        shown.add_row(name, *(each[name] for each in cells))
    return shown


def _details(part: Part) -> dict[str, str]:
    found = {
        "answers": f"{part.requests} in {part.seconds:.1f} s",
        "requests/s": digits(part.requests_per_s),
        "prompt tokens/s": digits(part.prompt_tokens_per_s),
        "output tokens/s": digits(part.output_tokens_per_s),
    }
    if part.good_percent is not None and part.good_per_s is not None:
        found["within the goal"] = f"{part.good_percent:.0f} %, {digits(part.good_per_s)}/s"
    times = {
        "time to first token": part.ttft,
        "time per output token": part.tpot,
        "between two tokens": part.itl,
        "end to end": part.e2e,
    }
    for name, spread in times.items():
        found[f"{name}, ms: mean / p50 / p90 / p99"] = _spread(spread)
    return found


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    return " / ".join(digits(ms) for ms in (spread.mean, spread.p50, spread.p90, spread.p99))


def overview(rows: Sequence[Row]) -> Table:
    """A line for each row."""
    shown = Table(box=box.MARKDOWN)
    shown.add_column("arrangement", no_wrap=True)
    shown.add_column("load", no_wrap=True)
    for name in ("answers", "req/s", "per device", "steady", "TTFT p50", "p99", "TPOT p50", "E2E"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("errors")
    for row in rows:
        whole, steady = row.summary.whole, row.summary.steady
        shown.add_row(
            row.arrangement,
            row.name + (" (cut)" if row.cut else ""),
            str(whole.requests),
            digits(whole.requests_per_s),
            digits(whole.requests_per_s / row.devices) if row.devices else "–",
            digits(steady.requests_per_s) if steady else "–",
            digits(whole.ttft.p50) if whole.ttft else "–",
            digits(whole.ttft.p99) if whole.ttft else "–",
            digits(whole.tpot.p50) if whole.tpot else "–",
            digits(whole.e2e.p50) if whole.e2e else "–",
            ", ".join(f"{n} {kind}" for kind, n in row.summary.errors.items()),
        )
    return shown


def digits(value: float) -> str:
    """Three of them, and all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")
