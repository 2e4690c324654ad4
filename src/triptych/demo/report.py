"""What the demo shows of a request: its timeline as a table, and two answers compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from triptych.demo.client import Answer


@dataclass
class Row:
    """Every span with one name, of one image, in one process."""

    item: int
    name: str
    who: str
    start_ms: float
    end_ms: float
    nbytes: int
    transport: str
    notes: list[str]
    count: int = 1


def rows(spans: Sequence[dict[str, Any]]) -> list[Row]:
    """Spans as rows: images in order, then what concerns the whole request, each by time."""
    found: dict[tuple[Any, ...], Row] = {}
    for span in sorted(spans, key=lambda span: float(span["start_ms"])):
        who = f"{span['role']} {span['pid']}"
        row = Row(
            span["item"], span["name"], who, span["start_ms"], span["end_ms"], span["nbytes"],
            span["transport"], [span["note"]] if span["note"] else [],
        )  # fmt: skip
        same = found.setdefault((row.item, row.name, who, row.transport), row)
        if same is not row:
            same.end_ms = max(same.end_ms, row.end_ms)
            same.nbytes += row.nbytes
            same.count += 1
            same.notes += [note for note in row.notes if note not in same.notes]
    last = max((row.item for row in found.values()), default=0) + 1
    return sorted(
        found.values(), key=lambda row: (row.item if row.item >= 0 else last, row.start_ms)
    )


def timeline_table(spans: Sequence[dict[str, Any]], names: Sequence[str]) -> Table:
    """Who did what for each image and for the request. ``names``: of the images, in order."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("image", "stage", "who (pid)"):
        table.add_column(heading, no_wrap=True)
    for heading in ("from ms", "to ms", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("transport", no_wrap=True)
    table.add_column("note", overflow="fold")
    before = None
    for row in rows(spans):
        if row.item != before and before is not None:
            table.add_section()
        image = names[row.item] if row.item >= 0 else "(request)"
        table.add_row(
            image if row.item != before else "",
            row.name if row.count == 1 else f"{row.name} ×{row.count}",
            row.who,
            f"{row.start_ms:.1f}",
            f"{row.end_ms:.1f}",
            f"{row.nbytes:,}" if row.nbytes else "",
            row.transport,
            "; ".join(row.notes),
        )
        before = row.item
    return table


def verdict(one: Answer, other: Answer) -> tuple[bool, str]:
    """Whether two answers have the same tokens, and a line that says so."""
    pairs = list(zip(one.tokens, other.tokens, strict=False))
    for index, (a, b) in enumerate(pairs):
        if a.piece != b.piece:
            return False, (
                f"NOT EQUAL: token {index} is {a.piece!r} (logprob {a.logprob:.4f}) in E/P/D "
                f"and {b.piece!r} (logprob {b.logprob:.4f}) in EPD"
            )
    if len(one.tokens) != len(other.tokens):
        return False, f"NOT EQUAL: {len(one.tokens)} tokens in E/P/D, {len(other.tokens)} in EPD"
    if not pairs:
        return False, "NOT EQUAL: there is no token to compare"
    if (one.text, one.finish) != (other.text, other.finish):
        return False, "NOT EQUAL: the tokens agree, but the text or the reason for its end does not"
    told = f"all {len(pairs)} tokens" if len(pairs) > 1 else "the only token"
    gap = max(abs(a.logprob - b.logprob) for a, b in pairs)
    return True, (
        f"EQUAL: {told} of E/P/D and of EPD {'are' if len(pairs) > 1 else 'is'} the same "
        f"(log-probabilities differ by at most {gap:.1e})"
    )
