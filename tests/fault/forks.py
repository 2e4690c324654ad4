"""Roles as processes that are forked from one which has imported everything.

What they run is ``triptych`` with a command line, or a module of the tests; what is saved is
several seconds of imports for each. The parent has one thread and has computed nothing, so its
children may do what they like.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_S = 200.0


@dataclass
class Forked:
    pid: int
    ends: dict[int, int]

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def poll(self) -> int | None:
        """Its exit status as ``subprocess`` has it; None while it runs."""
        return self.ends.get(self.pid)

    def wait(self, timeout_s: float) -> int:
        end = time.monotonic() + timeout_s
        while (status := self.poll()) is None:
            assert time.monotonic() < end, f"process {self.pid} still runs after {timeout_s} s"
            time.sleep(0.01)
        return status


class Forks:
    def __enter__(self) -> Forks:
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.fault.forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._ends: dict[int, int] = {}
        self._started: list[int] = []
        self._told = threading.Condition()
        self._reader = threading.Thread(target=self._read, name="forks")
        self._reader.start()
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._parent.stdin is not None and self._parent.stdout is not None
        self._parent.stdin.close()
        self._parent.wait(START_S)
        self._reader.join(START_S)
        self._parent.stdout.close()

    def start(
        self, argv: Sequence[str], log: Path, env: dict[str, str], module: str = "triptych.cli"
    ) -> Forked:
        """``main(argv)`` of ``module``; what it prints goes to ``log``."""
        wanted = {"module": module, "argv": list(argv), "log": str(log), "env": env}
        assert self._parent.stdin is not None
        with self._told:
            n_before = len(self._started)
            self._parent.stdin.write(json.dumps(wanted).encode() + b"\n")
            self._parent.stdin.flush()
            assert self._told.wait_for(lambda: len(self._started) > n_before, START_S)
            return Forked(self._started[-1], self._ends)

    def _read(self) -> None:
        assert self._parent.stdout is not None
        for line in self._parent.stdout:
            said: dict[str, Any] = json.loads(line)
            with self._told:
                if "status" in said:
                    self._ends[said["pid"]] = said["status"]
                else:
                    self._started.append(said["pid"])
                self._told.notify_all()


# ------------------------------------------------------------------ the parent


def become(wanted: dict[str, Any]) -> None:
    """In the child: run the command. Does not return."""
    out = os.open(wanted["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, fd in ((null, 0), (out, 1), (out, 2)):
        os.dup2(source, fd)
    os.environ.update(wanted["env"])
    try:
        importlib.import_module(wanted["module"]).main(wanted["argv"])
    finally:
        os._exit(1)


def reap() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        say({"pid": pid, "status": os.waitstatus_to_exitcode(status)})


def say(what: dict[str, int]) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def main() -> None:
    for role in ("router", "encoder", "prefill", "decode", "language"):
        importlib.import_module(f"triptych.{role}.server")
    buffered = b""
    while True:
        reap()
        if not select.select([0], [], [], 0.02)[0]:
            continue
        more = os.read(0, 1 << 16)
        if not more:
            return
        *lines, buffered = (buffered + more).split(b"\n")
        for line in lines:
            pid = os.fork()
            if pid == 0:
                become(json.loads(line))
            say({"pid": pid})


if __name__ == "__main__":
    main()
