"""The options of ``triptych bench``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class BenchTransferConfig:
    """Bytes from one process to another, by transport, size and number of pieces, beside a copy of
    the same bytes within one process and beside the bare Mooncake engine."""

    sizes: tuple[str, ...] = ("64K", "1M", "16M", "64M", "512M")
    """Bytes of one transfer, as in 64K, 16M, 1G. Three times the largest is needed in memory."""
    pieces: tuple[int, ...] = (1, 64)
    """Equal pieces that a transfer is cut into: KV arrives in blocks."""
    transports: tuple[Literal["shm", "http", "mooncake"], ...] = ()
    """By default all; those that cannot be had here are named. One asked for must work."""
    device: str = "cpu"
    """Where the bytes are read to: "cpu", "cuda", "cuda:1"."""
    producer_device: str | None = None
    """Where the bytes are; by default on ``device``, in another process's memory."""
    repeats: int = 200
    """Most rounds of one row."""
    seconds: float = 0.6
    """A row takes no new round after this long, once it has five."""
    json: Path | None = None
    """File for the figures."""
    plot: Path | None = None
    """Picture of the figures, .svg or .png; needs triptych[bench]."""


@dataclass(frozen=True)
class BenchPlotConfig:
    """Draw what ``bench transfer --json`` has measured. Needs triptych[bench]."""

    figures: Annotated[Path, tyro.conf.Positional]
    """File that ``--json`` wrote."""
    out: Path = Path("transfer.svg")
    """Picture, .svg or .png."""


@dataclass(frozen=True)
class BenchConfig:
    """Measure this installation."""

    what: tyro.conf.OmitSubcommandPrefixes[
        tyro.conf.OmitArgPrefixes[
            Annotated[BenchTransferConfig, tyro.conf.subcommand("transfer")]
            | Annotated[BenchPlotConfig, tyro.conf.subcommand("plot")]
        ]
    ]
