"""``triptych bench transfer`` as a user runs it, on sizes that take no time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from triptych.bench import report

TINY = ("--sizes", "64K", "1M", "--pieces", "1", "16", "--repeats", "6")


def bench(*arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """``path``: folder to look for packages in before all others."""
    found = os.pathsep.join(part for part in (path, os.environ.get("PYTHONPATH", "")) if part)
    return subprocess.run(
        [sys.executable, "-m", "triptych", "bench", *arguments],
        env={**os.environ, "PYTHONPATH": found},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_transport_is_measured_checked_and_drawn(tmp_path: Path) -> None:
    out, svg, png = (tmp_path / name for name in ("rows.json", "plot.svg", "plot.png"))
    done = bench("transfer", *TINY, "--json", str(out), "--plot", str(svg))
    assert done.returncode == 0, done.stderr
    found = report.load(out)
    assert (found.producer, found.consumer, found.absent) == ("cpu", "cpu", {})
    kinds = {"shm": (1, 16), "shm, in place": (1,), "http": (1, 16), "mooncake": (1, 16)}
    assert [(row.transport, row.nbytes, row.pieces) for row in found.rows] == [
        (transport, nbytes, count)
        for transport, pieces in kinds.items()
        for nbytes in (1 << 16, 1 << 20)
        for count in pieces
    ]
    for row in found.rows:
        assert 5 <= row.rounds <= 6 and row.pull_us <= row.pull_p99_us
        assert 0 < row.handoff_us < row.pull_us and row.handoff_us <= row.handoff_p99_us
        if row.transport == "shm, in place":
            assert row.read_us is row.gb_per_s is row.of_copy is row.bare_us is None
            continue
        assert row.read_us is not None and 0 < row.read_us < row.pull_us
        assert row.of_copy == pytest.approx(row.copy_us / row.read_us)
        bare = row.transport == "mooncake"
        assert row.protocol == ("tcp" if bare else "")
        assert (row.bare_us is not None) == (row.of_bare is not None) == bare
        if row.bare_us is not None:
            assert row.of_bare == pytest.approx(row.bare_us / row.read_us)
    for word in (
        "shm, in place",
        "http",
        "mooncake (tcp)",
        "of copy",
        "of bare",
        "64 KiB",
        "pull p99",
    ):
        assert word in done.stdout
    drawn = svg.read_text()
    for word in ("copy in one process", "shm, 16 pieces", "Transfer Engine alone", "1 MiB", "GB/s"):
        assert word in drawn
    assert len(drawn) < 100_000
    done = bench("plot", str(out), "--out", str(png))
    assert done.returncode == 0, done.stderr
    assert png.read_bytes().startswith(b"\x89PNG")


def test_what_is_not_here_is_named_unless_it_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "mooncake.py").write_text("raise ImportError('not on this machine')\n")
    out = tmp_path / "rows.json"
    few = ("--sizes", "64K", "--pieces", "1", "--repeats", "1")
    done = bench("transfer", *few, "--json", str(out), path=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "mooncake is not measured" in done.stdout and "triptych[mooncake]" in done.stdout
    found = report.load(out)
    assert {row.transport for row in found.rows} == {"shm", "shm, in place", "http"}
    assert "not on this machine" in found.absent["mooncake"]
    done = bench("transfer", *few, "--transports", "mooncake", path=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: the producer's process: transport mooncake needs")
