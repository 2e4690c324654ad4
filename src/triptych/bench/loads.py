"""Loads: the text form of one, and its requests, made before anything is timed."""

from __future__ import annotations

import base64
import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from triptych.bench.config import Load
from triptych.bench.pictures import Pictures, Piece, Size
from triptych.demo.corpus import WORDS
from triptych.errors import ConfigError

SHARED = 16
"""Images of each size that requests have in common, where ``shared_percent`` says so."""
_NUMBERS: dict[str, Callable[[str], Any]] = {"seconds": float, "rate": float, "trace": Path}


@dataclass(frozen=True)
class Request:
    at: float
    """Seconds after the load began; 0 in a closed loop, which sends when it is its turn."""
    body: bytes
    """JSON."""
    n_output: int
    """Tokens asked for."""


@dataclass(frozen=True)
class Sketch:
    """A request before its pictures are files."""

    at: float
    pieces: tuple[Piece, ...]
    text: str
    n_output: int


def parse_load(text: str, base: Load) -> Load:
    """``base`` with what ``text`` changes, as in "images=8 rate=inf". Raises ConfigError."""
    changes: dict[str, Any] = {}
    known = {field.name for field in fields(Load)}
    for word in text.split():
        name, equals, value = word.partition("=")
        if not equals or name not in known:
            raise ConfigError(f"{word!r} of {text!r}: write NAME=VALUE; {', '.join(sorted(known))}")
        kind = str if name == "size" else _NUMBERS.get(name, int)
        try:
            changes[name] = kind(value)
        except ValueError as exc:
            raise ConfigError(f"{word!r} of {text!r}: {exc}") from exc
    if "concurrency" in changes:
        changes = {"rate": None, "trace": None, **changes}
    return replace(base, **changes)


def check(load: Load) -> None:
    """Raises ConfigError."""
    parse_size(load.size)
    if not 0 <= load.shared_percent <= 100:
        raise ConfigError(f"--shared-percent must be between 0 and 100, not {load.shared_percent}")
    for name in ("text", "output", "requests", "concurrency"):
        if getattr(load, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, not {getattr(load, name)}")
    if load.images < 0 or load.warmup < 0:
        raise ConfigError("--images and --warmup must not be negative")
    if load.rate is not None and not load.rate > 0:
        raise ConfigError(f"--rate must be positive, not {load.rate}")
    if load.rate is not None and load.trace is not None:
        raise ConfigError("--rate and --trace exclude each other")


def parse_size(text: str) -> Size:
    """Raises ConfigError."""
    width, x, height = text.partition("x")
    if not (x and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ConfigError(f"not a size of images: {text!r}; write 1920x1080")
    return int(width), int(height)


def closed(load: Load) -> bool:
    return load.rate is None and load.trace is None


class Maker:
    """Makes the requests of one run. No picture and no text occurs in two of them, but those that
    ``shared_percent`` asks for."""

    def __init__(self, seed: int, model: str, *, ignore_eos: bool = True) -> None:
        self._pictures = Pictures(seed)
        self._random = np.random.default_rng([seed, 2])
        self._words = WORDS.split()
        self._model = model
        self._ignore_eos = ignore_eos
        self._shared: dict[Size, list[Piece]] = {}

    def warmup(self, load: Load) -> list[Request]:
        """Like those of ``load``; their pictures are never shared ones."""
        lone = replace(load, shared_percent=0, trace=None)
        return self._finish([self._sketch(lone) for _ in range(load.warmup)], _nothing)

    def requests(self, load: Load, done: Callable[[], None]) -> list[Request]:
        """In the order of sending; ``done`` is called at every picture. Raises ConfigError."""
        sketches = [self._sketch(each, at) for at, each in self._arrivals(load)]
        return self._finish(sketches, done)

    def _arrivals(self, load: Load) -> Iterator[tuple[float, Load]]:
        if load.trace is not None:
            yield from read_trace(load.trace, load)
            return
        at = 0.0
        for _ in range(load.requests):
            yield at, load
            if load.rate is not None:
                at += float(self._random.exponential(1 / load.rate))

    def _sketch(self, load: Load, at: float = 0.0) -> Sketch:
        size = parse_size(load.size)
        pieces = tuple(self._piece(size, load.shared_percent) for _ in range(load.images))
        text = " ".join(self._random.choice(self._words, load.text))
        return Sketch(at, pieces, text, load.output)

    def _piece(self, size: Size, shared_percent: int) -> Piece:
        if self._random.integers(100) >= shared_percent:
            return self._pictures.new(size)
        if size not in self._shared:
            self._shared[size] = [self._pictures.new(size) for _ in range(SHARED)]
        return self._shared[size][self._random.integers(SHARED)]

    def _finish(self, sketches: Sequence[Sketch], done: Callable[[], None]) -> list[Request]:
        pieces = (piece for sketch in sketches for piece in sketch.pieces)
        files = self._pictures.jpegs(pieces, done)
        return [
            Request(
                sketch.at,
                self._body(sketch, [files[piece] for piece in sketch.pieces]),
                sketch.n_output,
            )
            for sketch in sketches
        ]

    def _body(self, sketch: Sketch, files: Sequence[bytes]) -> bytes:
        urls = (f"data:image/jpeg;base64,{base64.b64encode(file).decode()}" for file in files)
        content: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [
                {"role": "user", "content": [*content, {"type": "text", "text": sketch.text}]}
            ],
            "max_tokens": sketch.n_output,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return msgspec.json.encode(body | ({"ignore_eos": True} if self._ignore_eos else {}))


def read_trace(path: Path, load: Load) -> Iterator[tuple[float, Load]]:
    """Seconds since the first arrival, and that request's load. Raises ConfigError."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row, _ in zip(csv.DictReader(file), range(load.requests), strict=False)]
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    begin: float | None = None
    for line, row in enumerate(rows, 2):
        try:
            at = _time(row["TIMESTAMP"])
            changes: dict[str, Any] = {
                "images": int(row["NumImages"]),
                "text": max(1, int(row["ContextTokens"])),
                "output": max(1, int(row["GeneratedTokens"])),
            }
            if row.get("ImageWidth"):
                changes["size"] = f"{int(row['ImageWidth'])}x{int(row['ImageHeight'])}"
        except (KeyError, TypeError, ValueError) as exc:
            raise ConfigError(f"{path}, line {line}: {exc!r}") from exc
        begin = at if begin is None else begin
        yield at - begin, replace(load, **changes)


def _time(text: str) -> float:
    """Seconds, of a number of them or a date and time."""
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text).timestamp()


def _nothing() -> None:
    pass
