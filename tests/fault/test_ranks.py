"""A group of ranks ends as one: whichever process is lost or stops, whatever the others do."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.fault.forks import Forks
from triptych.demo.tiny import make_tiny_model
from triptych.stage.ranks import EXIT_GIVEN_UP

PATIENCE_S = 3.0
"""Of ranks with each other."""
AT_ONCE_S = 10.0
"""More than a busy machine takes to see a process end, less than any timeout."""
START_S = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "qwen2_5_vl", "qwen2_5_vl")


class Leader:
    def __init__(self, forks: Forks, model: Path, log: Path, patience_s: float) -> None:
        self.log = log
        self.process = forks.start(
            (str(model), str(patience_s)), log, {}, module="tests.fault.rank_leader"
        )
        end = time.monotonic() + START_S
        while "answered" not in (said := log.read_text() if log.exists() else "").splitlines():
            assert self.process.poll() is None and time.monotonic() < end, said
            time.sleep(0.05)
        pid = next(line for line in said.splitlines() if line.isdecimal())
        self.follower = psutil.Process(int(pid))

    def ended(self, within_s: float) -> int:
        return self.process.wait(within_s)


@contextmanager
def leading(forks: Forks, model: Path, folder: Path, patience_s: float) -> Iterator[Leader]:
    leader = Leader(forks, model, folder / "leader.log", patience_s)
    try:
        yield leader
    finally:
        leader.process.kill()
        if leader.follower.is_running():
            leader.follower.kill()
        leader.process.wait(AT_ONCE_S)


def gone(process: psutil.Process) -> bool:
    end = time.monotonic() + AT_ONCE_S
    while time.monotonic() < end:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_killed_follower_ends_its_leader(forks: Forks, model: Path, tmp_path: Path) -> None:
    with leading(forks, model, tmp_path, START_S) as leader:
        leader.follower.kill()
        assert leader.ended(AT_ONCE_S) == EXIT_GIVEN_UP
        assert "the group of 2 ranks ends: " in leader.log.read_text()


@pytest.mark.full
def test_a_killed_leader_ends_its_follower(forks: Forks, model: Path, tmp_path: Path) -> None:
    with leading(forks, model, tmp_path, START_S) as leader:
        leader.process.kill()
        assert leader.ended(AT_ONCE_S) == -signal.SIGKILL
        assert gone(leader.follower)


@pytest.mark.full
def test_a_stopped_follower_is_waited_for_no_longer_than_agreed(
    forks: Forks, model: Path, tmp_path: Path
) -> None:
    with leading(forks, model, tmp_path, PATIENCE_S) as leader:
        os.kill(leader.follower.pid, signal.SIGSTOP)
        assert leader.ended(PATIENCE_S + AT_ONCE_S) == EXIT_GIVEN_UP
        assert gone(leader.follower)
