"""Pool and lender under random operations (``tests.transfer_machine``)."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.transfer_machine import Machine
from tests.transfer_model import Counts


def run(examples: int, steps: int, *, same: bool) -> Counts:
    Machine.counts = Counts()
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            derandomize=same,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return Machine.counts


@pytest.mark.parametrize(
    ("examples", "steps", "operations"),
    [(80, 200, 10_000), pytest.param(550, 200, 100_000, marks=pytest.mark.full)],
)
def test_any_order_of_operations(examples: int, steps: int, operations: int) -> None:
    """The short run is much the same every time (what is drawn depends on what was imported); the
    long one is another one every time."""
    short = operations == 10_000
    counts = run(examples, steps, same=short)
    assert counts.operations >= operations
    # A machine that never gets anywhere would find nothing.
    floor = 0 if short else operations / 1000
    assert min(counts.valid, counts.expired, counts.denied) > floor
    assert min(counts.waited, counts.passed, counts.stale_reads, counts.groups) > floor
