from __future__ import annotations

import logging
import os
import re
import subprocess
import sys

from prometheus_client import REGISTRY, generate_latest

from triptych.observe import log, metrics


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
