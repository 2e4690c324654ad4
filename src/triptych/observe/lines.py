"""The lines of Prometheus' text format. The same names and values come again: they are kept."""

from __future__ import annotations

from functools import lru_cache

from prometheus_client.utils import floatToGoString

REMEMBERED = 16_384
_ESCAPED = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


@lru_cache(maxsize=REMEMBERED)
def head(name: str, kind: str, text: str) -> str:
    """What stands above the samples of a metric."""
    if kind == "counter":
        name += "_total"
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return f"# HELP {name} {text}\n# TYPE {name} {kind}"


@lru_cache(maxsize=REMEMBERED)
def series(name: str, labels: tuple[tuple[str, str], ...]) -> str:
    """What stands before a sample's value."""
    if not labels:
        return name
    inside = ",".join(f'{label}="{value.translate(_ESCAPED)}"' for label, value in sorted(labels))
    return f"{name}{{{inside}}}"


@lru_cache(maxsize=REMEMBERED)
def number(value: float) -> str:
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]
