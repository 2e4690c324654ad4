"""The accuracy check: fifty questions through encoder, prefill and decode servers of their own.

As a user would run it: two deployments by ``triptych serve``, one ``triptych eval`` over both.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.end_to_end.served import Served
from triptych.demo.run import MODEL

QUESTIONS = Path(__file__).parents[2] / "examples" / "demo_model" / "questions.parquet"
WANTED = 0.9
EVAL_S = 240.0


def test_fifty_questions_apart_and_in_one_process(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ("--dtype", "float32")
    apart = ("--encoders", "2", "--chunk-tokens", "64", *options)
    with Served(MODEL, "E/P/D", apart) as servers, Served(MODEL, "EPD", options) as one:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "triptych", "eval", str(QUESTIONS), "--url", servers.url),
                *("--compare", one.url, "--json", str(out)),
            ],
            capture_output=True,
            text=True,
            timeout=EVAL_S,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["differing"] == []
    ours, theirs = found["results"]
    assert len(ours["answers"]) == len(theirs["answers"]) == 50
    for mine, other in zip(ours["answers"], theirs["answers"], strict=True):
        assert mine["error"] == "" and mine["response"] == other["response"], (mine, other)
    assert sum(each["right"] for each in ours["answers"]) >= WANTED * 50
