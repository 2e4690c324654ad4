"""A topology as a user starts it: ``triptych serve`` and its child processes."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import psutil

START_S = 120.0
STOP_S = 30.0


@dataclass
class Served:
    """``with Served(folder, "E/P/D") as served:`` answers at ``served.url``."""

    model: Path
    topology: str
    options: tuple[str, ...] = ()
    logs: Path | None = None
    url: str = ""
    output: str = field(default="", init=False)

    def __enter__(self) -> Served:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        options = [
            *("--topology", self.topology, "--port", str(port), "--threads", "1"),
            *("--kv-mib", "8", "--allow-private-media"),
            *(("--log-folder", str(self.logs)) if self.logs else ()),
            *self.options,
        ]
        command = [sys.executable, "-m", "triptych", "serve", str(self.model), *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            self.wait()
        except BaseException:
            self.process.kill()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        try:
            self.output, _ = self.process.communicate(timeout=STOP_S)
        finally:
            self.process.kill()
        left = [child for child in children if child.is_running()]
        for child in left:
            child.kill()
        assert not left, f"Ctrl-C left {left}: {self.output}"
        assert self.process.returncode == 0, self.output

    def workers(self, role: str) -> list[psutil.Process]:
        """The processes of a role, as the operating system knows them."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if role in child.cmdline()]

    def wait(self) -> None:
        """Until the topology is in effect."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                assert self.process.stdout is not None
                raise RuntimeError(f"serve ended: {self.process.stdout.read()}")
            if self._ready():
                return
            time.sleep(0.2)
        raise RuntimeError(f"not ready after {START_S:g} s")

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False
