"""The picture of a ``bench transfer`` run: speed of reads against size, a line per transport."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from triptych.bench.config import BenchPlotConfig
from triptych.bench.report import Report, Row, load, size
from triptych.errors import ConfigError

SUFFIXES = (".svg", ".png")
_STYLES = {"shm": ("#0072B2", "o"), "http": ("#009E73", "s"), "mooncake": ("#D55E00", "^")}
"""Colour and marker. The colours are Okabe and Ito's, told apart with any eyes."""
_GREY = "#555555"
_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "triptych", "font.size": 10.0}
"""Text as text keeps the file small; the salt makes equal runs equal files."""


def run(config: BenchPlotConfig) -> int:
    check(config.out)
    draw(load(config.figures), config.out)
    return 0


def check(path: Path) -> None:
    """Raises ConfigError unless ``draw`` can write there: called before minutes of measuring."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: a plot is a file ending in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no such folder")
    _matplotlib()


def draw(found: Report, path: Path) -> None:
    """Raises ConfigError."""
    rows = [row for row in found.rows if row.read_us is not None]
    if not rows:
        raise ConfigError("there is nothing to plot")
    with picture(path, (7.5, 5.2)) as figure:
        axes = figure.add_subplot()
        _lines(axes, rows)
        sizes = sorted({row.nbytes for row in rows})
        decades = _decades([_speed(row, row.read_us) for row in rows])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        slant = 30 if len(sizes) > 5 else 0
        axes.set_xticks(sizes, [size(nbytes) for nbytes in sizes], rotation=slant)
        axes.set_yticks(decades, [f"{value:g}" for value in decades])
        axes.tick_params(axis="x", which="minor", bottom=False)
        axes.set_ylabel("GB/s while reading")
        axes.set_title(_title(found), fontsize=10, loc="left", pad=12)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)


@contextmanager
def picture(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """A matplotlib figure of ``size`` inches that is written at the end. Raises ConfigError."""
    matplotlib, figures = _matplotlib()
    with matplotlib.rc_context(_SETTINGS):
        figure = figures.Figure(figsize=size, layout="constrained")
        yield figure
        # Without its date, a picture of the same figures is the same file.
        metadata = {"Date": None} if path.suffix == ".svg" else None
        try:
            figure.savefig(path, dpi=150, metadata=metadata)
        except OSError as exc:
            raise ConfigError(f"{path}: {exc.strerror}") from exc


def _lines(axes: Any, rows: Sequence[Row]) -> None:
    """The copy, where it was fastest, and for each transport one piece (full) and the most pieces
    (hollow, dashed)."""
    copies: dict[int, list[float]] = {}
    for row in rows:
        copies.setdefault(row.nbytes, []).append(_speed(row, row.copy_us))
    points = sorted((nbytes, max(speeds)) for nbytes, speeds in copies.items())
    axes.plot(*zip(*points, strict=True), color=_GREY, ls="--", label="copy in one process")
    few, many = min(row.pieces for row in rows), max(row.pieces for row in rows)
    for name in dict.fromkeys(row.transport for row in rows):
        color, marker = _STYLES[name]
        for pieces in sorted({few, many}):
            own = [row for row in rows if (row.transport, row.pieces) == (name, pieces)]
            look = {"color": color, "marker": marker}
            if pieces != few:
                look |= {"ls": "--", "markerfacecolor": "white"}
            _line(
                axes, _label(own[0]), [(row.nbytes, _speed(row, row.read_us)) for row in own], look
            )
        bare = [
            (row.nbytes, _speed(row, row.bare_us))
            for row in rows
            if row.transport == name and row.pieces == few and row.bare_us is not None
        ]
        if bare:
            look = {"color": color, "marker": "x", "ls": ":"}
            _line(axes, "Transfer Engine alone", bare, look)


def _line(axes: Any, label: str, points: Sequence[tuple[int, float]], look: dict[str, str]) -> None:
    axes.plot(*zip(*sorted(points), strict=True), label=label, lw=1.6, ms=5, **look)


def _speed(row: Row, us: float | None) -> float:
    """GB/s of something that was measured."""
    assert us is not None
    return row.nbytes / us / 1000


def _label(row: Row) -> str:
    name = f"{row.transport} ({row.protocol})" if row.protocol else row.transport
    return f"{name}, {row.pieces} piece{'s' if row.pieces > 1 else ''}"


def _title(found: Report) -> str:
    machine = ", ".join(sorted(set(found.gpus))) or f"{found.cpus} cores"
    return f"Reads from another process, {found.producer} to {found.consumer}, {machine}"


def _decades(values: Sequence[float]) -> list[float]:
    """Powers of ten around ``values``."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return [10.0**exponent for exponent in range(low, high + 1)]


def _matplotlib() -> tuple[Any, Any]:
    """The package and its figures. Not a dependency of serving, hence imported here."""
    try:
        return importlib.import_module("matplotlib"), importlib.import_module("matplotlib.figure")
    except ImportError as exc:
        raise ConfigError(f"plots need the package extra triptych[bench]: {exc}") from exc
