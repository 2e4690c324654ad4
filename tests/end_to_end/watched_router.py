"""A router process that watches its own event loop: ``python -m tests.end_to_end.watched_router``.

Arguments: model folder and port. The router runs as ``triptych router`` runs it, with one more
task on its loop. SIGTERM ends it, and it writes a line of JSON: when its loop was late, and by how
many seconds, [[clock, late], ...]. Late is what this process itself is the reason for: time on the
clock without what the loop's thread waited for a processor, and no more than the CPU time that the
process used meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time

import uvloop

from tests.end_to_end.stub_workers import SECRETS
from triptych import single
from triptych.config import ModelConfig, RouterConfig
from triptych.observe import log

PERIOD_S = 0.001


async def watch(late_s: list[tuple[float, float]]) -> None:
    statistics = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY)

    def waited_s() -> float:
        """For a processor, so far."""
        return int(os.pread(statistics, 80, 0).split()[1]) / 1e9

    while True:
        clock, cpu, waited = time.monotonic(), time.process_time(), waited_s()
        await asyncio.sleep(PERIOD_S)
        used = time.process_time() - cpu
        late = time.monotonic() - clock - PERIOD_S - (waited_s() - waited)
        late_s.append((clock, min(late, used)))


async def main() -> None:
    config = RouterConfig(
        ModelConfig(sys.argv[1]), port=int(sys.argv[2]), served_name="tiny", topology="E/P/D"
    )
    log.setup("router")
    late_s: list[tuple[float, float]] = []
    server = single.create("router", config, SECRETS)
    watching = asyncio.create_task(watch(late_s))
    await server.serve()
    watching.cancel()
    sys.stdout.write(json.dumps(late_s) + "\n")


if __name__ == "__main__":
    uvloop.run(main())
