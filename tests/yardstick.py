"""How slow this machine is now: limits of time are for one of usual speed."""

from __future__ import annotations

import statistics
import time

YARD_S = 0.0035
"""What ``yardstick`` takes on a machine of usual speed."""


def yardstick() -> float:
    """Seconds for a hundred thousand additions, the median of some."""
    times = []
    for _ in range(15):
        begin, total = time.perf_counter(), 0
        for number in range(100_000):
            total += number
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def slowness(yards: list[float]) -> float:
    """By how much limits are to be multiplied; 1 where the machine is as fast as usual."""
    return max(1.0, statistics.median(yards) / YARD_S)
