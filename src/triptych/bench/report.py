"""What ``triptych bench transfer`` found: as JSON, and as tables that are Markdown as well."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch
from rich import box
from rich.table import Table

from triptych import __version__
from triptych.errors import ConfigError

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One transport, size and number of pieces. Times are medians in µs, p99 where it says so.

    Bytes used in place, in their producer's memory, are a transport of their own, without a read.
    """

    transport: str
    protocol: str
    """What Mooncake moved the bytes by: "tcp", "rdma", "nvlink"; empty for other transports."""
    nbytes: int
    pieces: int
    rounds: int
    """Counted rounds: one pull, one copy and where there is one the bare engine, in turn."""
    pull_us: float
    """What a consumer waits for once bytes are ready: claim, ready, read if any, validate."""
    pull_p99_us: float
    handoff_us: float
    """A pull without its read; in place, from the claim to a usable view."""
    handoff_p99_us: float
    read_us: float | None
    copy_us: float
    """The same bytes copied between the same two places within one process."""
    bare_us: float | None
    """The same reads by the Transfer Engine alone; None for other transports."""
    gb_per_s: float | None
    """Of the read; 10**9 bytes."""
    of_copy: float | None
    """Speed of the read over that of the copy."""
    of_bare: float | None
    """Speed of the read over that of the bare engine."""


class Report(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run, with what one must know to read its figures."""

    triptych: str
    python: str
    torch: str
    cpus: int
    """Cores that this process may use."""
    load: float
    """Load average of the last minute at the start: above 0, the machine was not alone."""
    gpus: tuple[str, ...]
    producer: str
    """Device that the bytes were on."""
    consumer: str
    """Device that they were read to."""
    absent: dict[str, str]
    """Transports that could not be had here, and why."""
    rows: tuple[Row, ...]


@dataclass
class Times:
    """Seconds of each round of one row."""

    pull: list[float] = field(default_factory=list)
    handoff: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    copy: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)

    def row(self, transport: str, protocol: str, nbytes: int, pieces: int) -> Row:
        read = _median(self.read) if self.read else None
        bare = _median(self.bare) if self.bare else None
        copy = _median(self.copy)
        return Row(
            transport=transport,
            protocol=protocol,
            nbytes=nbytes,
            pieces=pieces,
            rounds=len(self.pull),
            pull_us=_median(self.pull),
            pull_p99_us=_p99(self.pull),
            handoff_us=_median(self.handoff),
            handoff_p99_us=_p99(self.handoff),
            read_us=read,
            copy_us=copy,
            bare_us=bare,
            gb_per_s=read and nbytes / read / 1000,
            of_copy=read and copy / read,
            of_bare=read and bare and bare / read,
        )


def report(producer: str, consumer: str) -> Report:
    """One without rows, of this machine now."""
    count = torch.cuda.device_count()
    return Report(
        triptych=__version__,
        python=platform.python_version(),
        torch=str(torch.__version__),
        cpus=len(os.sched_getaffinity(0)),
        load=round(os.getloadavg()[0], 2),
        gpus=tuple(torch.cuda.get_device_name(index) for index in range(count)),
        producer=producer,
        consumer=consumer,
        absent={},
        rows=(),
    )


def save(found: Report, path: Path) -> None:
    """Raises ConfigError."""
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}") from exc


def load(path: Path) -> Report:
    """Raises ConfigError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}") from exc
    except msgspec.DecodeError as exc:
        raise ConfigError(f"{path} is not a file of bench transfer: {exc}") from exc


def table(rows: Sequence[Row]) -> Table:
    """Of one transport."""
    lines = [_cells(row) for row in rows]
    shown = Table(box=box.MARKDOWN)
    for name in lines[0]:
        shown.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        shown.add_row(*line.values())
    return shown


def _cells(row: Row) -> dict[str, str]:
    """By column."""
    cells = {
        "size": size(row.nbytes),
        "pieces": str(row.pieces),
        "pull p50": _time(row.pull_us),
        "pull p99": _time(row.pull_p99_us),
        "hand-off": _time(row.handoff_us),
    }
    if row.read_us is None or row.gb_per_s is None:
        return {**cells, "its p99": _time(row.handoff_p99_us), "copy": _time(row.copy_us)}
    cells |= {"read": _time(row.read_us), "GB/s": f"{row.gb_per_s:.3g}"}
    cells |= {"copy": _time(row.copy_us), "of copy": f"{row.of_copy:.2f}"}
    if row.bare_us is not None:
        cells |= {"bare": _time(row.bare_us), "of bare": f"{row.of_bare:.2f}"}
    return cells


def size(nbytes: int) -> str:
    unit, name = next((unit, name) for name, unit in reversed(UNITS.items()) if nbytes % unit == 0)
    return f"{nbytes // unit} {name}iB" if name else f"{nbytes} B"


def _time(us: float) -> str:
    """Three digits."""
    unit, name = next((u, n) for u, n in ((1, "µs"), (1e3, "ms"), (1e6, "s")) if us < 999.5 * u)
    return f"{us / unit:#.3g}".rstrip(".") + f" {name}"


def _median(seconds: Sequence[float]) -> float:
    """In µs."""
    return 1e6 * statistics.median(seconds)


def _p99(seconds: Sequence[float]) -> float:
    """In µs; of fewer than a hundred, the longest."""
    return 1e6 * sorted(seconds)[math.ceil(0.99 * len(seconds)) - 1]
