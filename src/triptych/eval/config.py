"""The options of ``triptych eval``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class EvalConfig:
    """Ask questions in MMMU's format of an OpenAI-compatible server: accuracy by subfield."""

    data: Annotated[Path, tyro.conf.Positional]
    """Parquet file, or a folder of them."""
    url: str = "http://127.0.0.1:8000"
    compare: str | None = None
    """Another server, asked the same."""
    model: str | None = None
    """Its name in requests; by default the first that the server lists."""
    split: str = ""
    """Of a folder, only files whose name begins with this, as in "validation"."""
    limit: int | None = None
    """Only the first so many questions."""
    concurrency: int = 8
    """Questions under way at a time."""
    max_tokens: int = 64
    seed: int = 0
    """Of the requests, and of the guess that stands for an answer without any choice in it."""
    json: Path | None = None
    """File for every response and the figures."""
