from __future__ import annotations

import logging
import math
import os
import re
import subprocess
import sys

import pytest
from prometheus_client import (
    PROCESS_COLLECTOR,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from triptych.observe import exposition, log, metrics, process


def value(sample: str, /, **labels: str) -> float:
    return REGISTRY.get_sample_value(sample, labels) or 0.0


def test_a_log_line_names_time_level_role_and_process() -> None:
    script = (
        "import logging\nfrom triptych.observe import log\nlog.setup('prefill')\n"
        "logging.getLogger('triptych.engine').warning('a %s', 'b')\n"
        "logging.getLogger('triptych.engine').debug('not shown')\n"
        "import os; print(os.getpid())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True
    )
    line = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING prefill\[(\d+)\] triptych\.engine: a b\n"
    match = re.fullmatch(line, done.stderr)
    assert match is not None, done.stderr
    assert match[1] == done.stdout.strip() != str(os.getpid())


def test_setting_up_twice_does_not_write_twice() -> None:
    root, access = logging.getLogger(), logging.getLogger("uvicorn.access")
    before = (list(root.handlers), root.level, access.level)
    try:
        log.setup("router")
        log.setup("router")
        assert len(root.handlers) == 1
    finally:
        root.handlers[:], root.level = before[0], before[1]
        access.setLevel(before[2])


def test_a_span_is_counted_with_its_bytes() -> None:
    labels = {"role": "decode", "name": "test_kv_read"}
    moved = value("triptych_moved_bytes_total", transport="test")
    metrics.record_span("decode", "test_kv_read", 0.02, 4096, "test")
    metrics.record_span("decode", "test_kv_read", 0.2, 0, "")
    assert value("triptych_span_seconds_count", **labels) == 2
    assert value("triptych_span_seconds_bucket", **labels, le="0.025") == 1
    assert value("triptych_moved_bytes_total", transport="test") - moved == 4096


def test_every_metric_of_ours_has_the_prefix_and_a_help_text() -> None:
    helps = [line for line in generate_latest().decode().splitlines() if line.startswith("# HELP")]
    ours = [line for line in helps if " triptych_" in line]
    assert any("triptych_span_seconds" in line for line in ours)
    assert all(len(line.split(maxsplit=3)) == 4 for line in ours)


# ------------------------------------------------------------------ /metrics


def lines_but_the_processs(text: bytes) -> list[str]:
    """Without what changes from one moment to the next."""
    changing = ("process_", "python_gc_")
    return [line for line in text.decode().splitlines() if not line.startswith(changing)]


def test_metrics_are_written_as_the_client_library_writes_them() -> None:
    registry = CollectorRegistry()
    awkward = Counter("awkward", 'Say "no"\nto \\ this.', ["b", "a"], registry=registry)
    awkward.labels('quoted "', "back\\slash\nline").inc(1e21)
    awkward.labels("ü", "").inc(0.1)
    Gauge("negative", "x", registry=registry).set(-math.inf)
    Histogram("times", "x", ["role"], registry=registry).labels("r").observe(3)
    assert exposition.render(registry) == generate_latest(registry)
    metrics.record_span("decode", "test_kv_read", 0.02, 4096, "test")
    ours, theirs = exposition.render(), generate_latest()
    assert lines_but_the_processs(ours) == lines_but_the_processs(theirs)
    names = {line.split()[0] for line in ours.decode().splitlines() if line[0] != "#"}
    assert {"process_cpu_seconds_total", "python_gc_collections_total"} <= {
        name.partition("{")[0] for name in names
    }
    assert not any(name.endswith("_created") for name in names)


def test_the_processs_own_figures_are_the_client_librarys() -> None:
    with open(os.devnull) as one_more:
        ours = {metric.name: metric for metric in process.ProcessCollector().collect()}
        theirs = {metric.name: metric for metric in PROCESS_COLLECTOR.collect()}
        assert one_more.fileno() > 0
    assert ours.keys() == theirs.keys()
    for name, metric in theirs.items():
        assert (ours[name].type, ours[name].documentation) == (metric.type, metric.documentation)
        (found,), (expected,) = ours[name].samples, metric.samples
        assert found.name == expected.name
        # Files are listed through one more of them; memory grows and time passes in between.
        assert found.value == pytest.approx(expected.value, rel=0.1, abs=2)


def test_a_scrape_opens_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each system call lets another thread have Python's lock."""
    exposition.render()

    def refused(*args: object, **kwargs: object) -> None:
        raise AssertionError("a file was opened")

    monkeypatch.setattr("builtins.open", refused)
    monkeypatch.setattr(os, "listdir", refused)
    text = exposition.render().decode()
    for name in ("process_resident_memory_bytes", "process_open_fds", "process_cpu_seconds_total"):
        assert float(text.split(f"\n{name} ")[1].split()[0]) > 0
