"""How long workers hold on to a request whose client has gone.

    python benchmarks/disconnect.py --tries 20

Starts E/P/D as processes of their own, sends a request, waits until it is in a state (its images
are encoded, its prompt is computed in chunks of 32 tokens, its answer is decoded), closes the
client's connection and looks at all workers' ``/metrics`` until nothing is held or queued for it.
Times are from the close to the answer that says so: the step that runs, and the looking, are in
them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.fault.deployed import Deployed
from tests.fault.forks import Forks
from tests.fault.leaving import COUNTS, OPTIONS, STATES, Leaving, Left
from tests.yardstick import yardstick

from triptych.demo.tiny import make_tiny_model

WANTED_S = 0.1


def measure(leaving: Leaving, tries: int) -> list[Left]:
    for state in STATES:  # what is imported and allocated at first use
        leaving.leave(state, stream=True)
    return [
        leaving.leave(state, stream=stream)
        for state in STATES
        for stream in (True, False)
        for _ in range(tries)
    ]


def look_s(leaving: Leaving, tries: int = 20) -> float:
    """Seconds of one look at every worker."""
    times = []
    for _ in range(tries):
        begin = time.perf_counter()
        for worker in leaving.workers.values():
            worker.holds()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def show(found: list[Left], roles: list[str]) -> None:
    table = Table("state", "streamed", "all, median", "all, longest", *roles)
    for state in STATES:
        for stream in (True, False):
            some = [left for left in found if (left.state, left.stream) == (state, stream)]
            medians = [statistics.median(left.free_s[role] for left in some) for role in roles]
            times = [left.all_s for left in some]
            cells = [statistics.median(times), max(times), *medians]
            table.add_row(state, "yes" if stream else "no", *(f"{1e3 * s:.0f} ms" for s in cells))
    Console(width=110).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="How long a request outlives its client.")
    parser.add_argument("--tries", type=int, default=20, help="of each state")
    parser.add_argument("--json", type=Path, help="file for every time, in seconds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Forks() as forks:
        model = make_tiny_model(Path(folder) / "qwen3_vl", "qwen3_vl")
        with (
            Deployed(forks, model, COUNTS, Path(folder), OPTIONS) as deployed,
            Leaving(deployed) as leaving,
        ):
            found = measure(leaving, options.tries)
            show(found, list(COUNTS))
            print(f"one look at all workers: {1e3 * look_s(leaving):.0f} ms")
            print(f"a hundred thousand additions: {1e3 * yardstick():.1f} ms")
    if options.json is not None:
        options.json.write_text(json.dumps([vars(left) for left in found], indent=1))
    late = sum(left.all_s > WANTED_S for left in found)
    print(f"later than {1e3 * WANTED_S:.0f} ms: {late} of {len(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
