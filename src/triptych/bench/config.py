"""The options of ``triptych bench``."""

from __future__ import annotations

from dataclasses import dataclass, field
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
class Load:
    """One kind of request, and when such requests are sent."""

    images: int = 1
    """Images of a request; no two are the same."""
    size: str = "1920x1080"
    """Width and height of every image, in pixels."""
    shared_percent: int = 0
    """So many of a hundred images are of ``SHARED`` that requests have in common."""
    text: int = 128
    """Words of the text: one token each for most tokenizers."""
    output: int = 64
    """Tokens of the answer."""
    requests: int = 32
    """Most requests."""
    seconds: float | None = None
    """No request is sent after this long."""
    concurrency: int = 1
    """Closed loop: requests under way at a time."""
    rate: float | None = None
    """Open loop: requests a second, at random (Poisson). "inf": all at once."""
    trace: Path | None = None
    """Open loop: a CSV file with TIMESTAMP, NumImages, ContextTokens and GeneratedTokens, as in the
    public Azure trace, and perhaps ImageWidth and ImageHeight."""
    warmup: int = 2
    """Requests before, all at once, that do not count."""


@dataclass(frozen=True)
class Goal:
    """What a request must reach to count as good."""

    slo_ttft: float | None = None
    """Most milliseconds to the first token."""
    slo_tpot: float | None = None
    """Most milliseconds between tokens, on average over the answer."""


@dataclass(frozen=True)
class BenchServeConfig:
    """Load on an OpenAI-compatible server, and what came back how fast."""

    urls: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="URL")]
    """The server; of several, each takes the next request in turn."""
    load: tyro.conf.OmitArgPrefixes[Load] = field(default_factory=Load)
    beside: tuple[str, ...] = ()
    """Further loads at the same time, reported apart, as changes of the first one: "images=0
    rate=4". They end with the first one."""
    goal: tyro.conf.OmitArgPrefixes[Goal] = field(default_factory=Goal)
    model: str | None = None
    """Its name in requests; by default the first that the server lists."""
    ignore_eos: bool = True
    """Ask for answers of exactly ``--output`` tokens. Not every server knows the field."""
    limit: float = 3600.0
    """Seconds after which what is under way is given up."""
    seed: int | None = None
    """Of images, words and arrivals. By default another one each time: nothing is cached."""
    label: str | None = None
    """Name of the run in tables; by default the URL."""
    json: Path | None = None
    """File for the figures."""


@dataclass(frozen=True)
class BenchTopologiesConfig:
    """Start arrangements of this machine's devices and load each the same."""

    arrangements: tuple[str, ...] = ("E+PD", "E/PD", "replicas", "E/P/D")
    """Which, in this order. "replicas": EPD on every device, each takes the next request in turn.
    "pairs": E/PD on every device, likewise. "E/PD": encoder on the first device, language workers
    on the others. "E+PD": an encoder and a language worker on every device, in one process, behind
    one router; "beside": in two processes. "E/P/D": encoder and decode on the first device, prefill
    on the others. "E/PD:shm" forces a transport."""
    devices: tuple[str, ...] = ("cpu", "cpu")
    """As in "cuda:0" "cuda:1". A device may be named twice."""
    shape: Literal["tiny", "qwen2.5-vl-7b", "qwen3-vl-8b"] = "tiny"
    """Random weights of this shape."""
    model: str | None = None
    """A model of your own in place of ``--shape``, which then says how large pools are."""
    suite: Literal["small", "core", "full", "steady"] = "small"
    """Which loads: "small" for the tiny shape, the others for real ones."""
    rows: tuple[str, ...] = ()
    """Only these loads of the suite, by name."""
    kv_mib: int | None = None
    """As of ``serve``; by default what suits the shape. Likewise below."""
    pool_mib: int | None = None
    landing_mib: int | None = None
    chunk_tokens: int | None = None
    batch_patches: int | None = None
    media_threads: int | None = None
    threads: int = 1
    """CPU threads of each model, where it is on a CPU."""
    selftest: bool = True
    """As of ``serve``."""
    compile_cache: Path | None = None
    """As of ``serve``."""
    together: int = 1
    """So many arrangements are up at a time, idle but for the one that is measured. They take turns
    load by load."""
    start_timeout: float = 180.0
    """Seconds until an arrangement must be ready."""
    limit: float = 3600.0
    """Seconds for everything: what is under way then is cut, what follows is left out."""
    goal: tyro.conf.OmitArgPrefixes[Goal] = field(default_factory=Goal)
    seed: int = 0
    logs: Path | None = None
    """Folder of the servers' logs; by default a temporary one, named at start."""
    json: Path | None = None
    """File for the figures, written anew after every load."""


@dataclass(frozen=True)
class BenchCompareConfig:
    """Put runs of ``bench serve`` or ``bench topologies`` beside each other."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files that ``--json`` wrote; "FILE#NAME" takes one arrangement of a file. The first is what
    the others are divided by."""
    plot: Path | None = None
    """Picture, .svg or .png; needs triptych[bench]."""


@dataclass(frozen=True)
class BenchConfig:
    """Measure this installation."""

    what: tyro.conf.OmitSubcommandPrefixes[
        tyro.conf.OmitArgPrefixes[
            Annotated[BenchTransferConfig, tyro.conf.subcommand("transfer")]
            | Annotated[BenchPlotConfig, tyro.conf.subcommand("plot")]
            | Annotated[BenchServeConfig, tyro.conf.subcommand("serve")]
            | Annotated[BenchTopologiesConfig, tyro.conf.subcommand("topologies")]
            | Annotated[BenchCompareConfig, tyro.conf.subcommand("compare")]
        ]
    ]
