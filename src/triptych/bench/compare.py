"""``triptych bench compare``: runs and arrangements beside each other, in ratios and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from triptych.bench import plot, serving
from triptych.bench.config import BenchCompareConfig
from triptych.bench.figures import Part, Spread
from triptych.bench.serve import console
from triptych.bench.serving import Row, digits
from triptych.errors import ConfigError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, told apart with any eyes."""


def _p50(spread: Spread | None) -> float | None:
    return spread.p50 if spread is not None else None


def _p99(spread: Spread | None) -> float | None:
    return spread.p99 if spread is not None else None


FIGURES: dict[str, Callable[[Part], float | None]] = {
    "requests/s": lambda part: part.requests_per_s,
    "output tokens/s": lambda part: part.output_tokens_per_s,
    "TTFT p50, ms": lambda part: _p50(part.ttft),
    "TTFT p99, ms": lambda part: _p99(part.ttft),
    "TPOT p50, ms": lambda part: _p50(part.tpot),
    "end to end p50, ms": lambda part: _p50(part.e2e),
}
PLOTTED = ("requests/s", "TTFT p50, ms", "TPOT p50, ms")


@dataclass(frozen=True)
class Side:
    """One of the things compared."""

    name: str
    rows: dict[str, Row]
    """By name of the load."""


def sides(sources: Sequence[str]) -> list[Side]:
    """Every arrangement of every file; of "FILE#NAME" that one. Raises ConfigError."""
    found: list[Side] = []
    for source in sources:
        file, _, name = source.partition("#")
        rows = serving.load(Path(file)).rows
        names = list(dict.fromkeys(row.arrangement for row in rows))
        if name and name not in names:
            raise ConfigError(f"{file} has no arrangement {name!r}, but {', '.join(names)}")
        for each in [name] if name else names:
            label = each if len(sources) == 1 else f"{Path(file).stem}: {each}"
            own = {row.name: row for row in rows if row.arrangement == each}
            found.append(Side(label, own))
    if len(found) < 2:
        raise ConfigError("there is nothing to compare: name two files, or one of several runs")
    return found


def tables(compared: Sequence[Side]) -> list[tuple[str, Table]]:
    """For each load that the first side and another one have: its name and the figures, each with
    its ratio to the first side's. Steady states where all sides have one."""
    first, *others = compared
    found = []
    for name, row in first.rows.items():
        rows = [row, *(side.rows[name] for side in others if name in side.rows)]
        if len(rows) < 2:
            continue
        parts, what = _parts(rows)
        shown = Table(box=box.MARKDOWN)
        shown.add_column("figure", no_wrap=True)
        for side in (side for side in compared if name in side.rows):
            shown.add_column(side.name, justify="right")
        for figure, value in FIGURES.items():
            shown.add_row(figure, *_cells([value(part) for part in parts]))
        found.append((f"{name or 'load'} ({what})", shown))
    return found


def _parts(rows: Sequence[Row]) -> tuple[list[Part], str]:
    steady = [row.summary.steady for row in rows if row.summary.steady is not None]
    if len(steady) == len(rows):
        return steady, "steady state"
    return [row.summary.whole for row in rows], "whole"


def _cells(values: Sequence[float | None]) -> list[str]:
    base = values[0]
    return [
        "–"
        if value is None
        else digits(value)
        if index == 0 or not base
        else f"{digits(value)} (x {value / base:.2f})"
        for index, value in enumerate(values)
    ]


def draw(compared: Sequence[Side], path: Path) -> None:
    """A bar for each side and load, one panel for each figure. Raises ConfigError."""
    names = list(dict.fromkeys(name for side in compared for name in side.rows))
    height = 1.2 + 0.22 * len(names) * (len(compared) + 1)
    with plot.picture(path, (11.0, height)) as figure:
        panels = figure.subplots(1, len(PLOTTED), sharey=True)
        thick = 0.8 / len(compared)
        for axes, what in zip(panels, PLOTTED, strict=True):
            for index, side in enumerate(compared):
                points = [
                    (place + (index - (len(compared) - 1) / 2) * thick, value)
                    for place, name in enumerate(names)
                    if name in side.rows
                    and (value := FIGURES[what](side.rows[name].summary.whole)) is not None
                ]
                places, values = zip(*points, strict=True) if points else ((), ())
                label = side.name if axes is panels[0] else None
                color = COLOURS[index % len(COLOURS)]
                bars = axes.barh(places, values, thick, label=label, color=color)
                axes.bar_label(bars, [digits(value) for value in values], padding=2, fontsize=7)
            axes.set_title(what, fontsize=10)
            axes.set_yticks(range(len(names)), names)
            axes.margins(x=0.18)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].invert_yaxis()
        figure.legend(loc="outside lower center", ncols=min(4, len(compared)), frameon=False)


def run(config: BenchCompareConfig) -> int:
    """Raises ConfigError."""
    if config.plot is not None:
        plot.check(config.plot)
    compared = sides(config.files)
    out = console()
    found = tables(compared)
    if not found:
        raise ConfigError("the first has no load that another one has")
    for name, shown in found:
        out.print(f"\n{name}")
        out.print(shown)
    if config.plot is not None:
        draw(compared, config.plot)
    return 0
