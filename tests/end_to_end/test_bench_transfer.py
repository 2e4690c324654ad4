"""``triptych bench transfer`` as a user runs it, on sizes that take no time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from triptych.bench.transfer import parse_size
from triptych.errors import ConfigError


def test_every_transport_is_measured_and_checked(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    options = ["--sizes", "64K", "1M", "--pieces", "1", "16", "--repeats", "3", "--json", str(out)]
    command = [sys.executable, "-m", "triptych", "bench", "transfer", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    kinds = [(row["transport"], row["nbytes"], row["pieces"]) for row in rows]
    assert kinds == [
        (transport, nbytes, pieces)
        for transport in ("shm", "http", "mooncake")
        for nbytes in (1 << 16, 1 << 20)
        for pieces in (1, 16)
    ]
    assert all(0 < row["read_us"] <= row["pull_us"] for row in rows)
    assert all(word in done.stdout for word in ("shm", "http", "mooncake", "ratio", "64 KiB"))


@pytest.mark.parametrize(("text", "nbytes"), [("4096", 4096), ("64K", 1 << 16), ("2G", 2 << 30)])
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "K", "1.5M", "-1", "12Q", "0"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="not a size"):
        parse_size(text)
