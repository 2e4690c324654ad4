"""A topology whose roles are started one by one, as on several hosts: each a command of its own."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fault.forks import Forked, Forks

START_S = 120.0
STOP_S = 40.0
OPERATOR_KEY = "the key of the tests' operator"
ENVIRONMENT = {
    "TRIPTYCH_SECRET": "the shared secret of the tests",
    "TRIPTYCH_OPERATOR_KEY": OPERATOR_KEY,
}
HELD = ("leased", "pinned", "reserved", "quarantined")
"""States of pool memory that somebody holds."""


@dataclass
class Role:
    name: str
    process: Forked
    log: Path


@dataclass
class Deployed:
    """``with Deployed(forks, folder, {"encoder": 2, ...}, logs) as deployed:`` answers at its
    ``url``.

    ``options``: arguments by role; those of "all" are every role's.
    """

    forks: Forks
    model: Path
    counts: dict[str, int]
    logs: Path
    options: dict[str, tuple[str, ...]] = field(default_factory=dict)
    url: str = ""
    roles: list[Role] = field(default_factory=list)

    def __enter__(self) -> Deployed:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._started: Counter[str] = Counter()
        topology = "E/PD" if "language" in self.counts else "E/P/D"
        wanted = [w for role, n in self.counts.items() for w in (f"--{role}s", str(n))]
        self._start("router", "--port", str(port), "--topology", topology, *wanted)
        try:
            for role, count in self.counts.items():
                for _ in range(count):
                    self.start(role)
            self.until(lambda: self.ready()[0] == 200, START_S)
        except BaseException:
            self._kill_all()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._kill_all()
        log = self.roles[0].log.read_text()
        assert "Traceback" not in log, f"a bug in the router:\n{log}"

    # ------------------------------------------------------------------ processes

    def start(self, role: str) -> Role:
        """One more worker."""
        threads = ("--threads", "1")
        return self._start(role, "--router", self.url, *threads)

    def _start(self, role: str, *arguments: str) -> Role:
        name = f"{role}-{self._started[role]}"
        self._started[role] += 1
        options = (*self.options.get("all", ()), *self.options.get(role, ()))
        log = self.logs / f"{name}.log"
        command = (role, str(self.model), *arguments, *options)
        made = Role(name, self.forks.start(command, log, ENVIRONMENT), log)
        self.roles.append(made)
        return made

    def alive(self, role: str) -> list[Role]:
        return [r for r in self.roles if r.name.startswith(f"{role}-") and r.process.poll() is None]

    def _kill_all(self) -> None:
        for role in self.roles:
            if role.process.poll() is None:
                role.process.send_signal(signal.SIGCONT)
                role.process.kill()
            role.process.wait(STOP_S)

    # ------------------------------------------------------------------ what they say

    def until(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> float:
        """Seconds until it held."""
        began = time.monotonic()
        while not condition():
            for role in self.roles[:1]:
                assert role.process.poll() is None, role.log.read_text()
            assert time.monotonic() - began < timeout_s, self.said()
            time.sleep(0.02)
        return time.monotonic() - began

    def said(self) -> str:
        logs = (f"{role.name}:\n{role.log.read_text()[-2000:]}" for role in self.roles)
        return "\n".join((str(self.ready()), *logs))

    def ready(self) -> tuple[int, dict[str, Any]]:
        return call(f"{self.url}/ready")

    def present(self, role: str) -> int:
        return int(self.ready()[1].get("workers", {}).get(role, 0))

    def members(self) -> list[dict[str, Any]]:
        """As ``GET /workers`` describes them."""
        return list(call(f"{self.url}/workers", key=OPERATOR_KEY)[1]["workers"])

    def held(self) -> dict[str, float]:
        """What the registered workers hold for requests: leases, and bytes of their pools."""
        return {
            f"{member['id']} {name}": value
            for member in self.members()
            for name, value in holdings(member["url"]).items()
            if value
        }

    def loads(self) -> dict[str, int]:
        return {member["id"]: member["load"] for member in self.members() if member["load"]}

    def nothing_left(self, timeout_s: float = 20.0) -> float:
        """Waits until no worker holds anything; seconds that took."""
        return self.until(lambda: not self.held() and not self.loads(), timeout_s)


def call(url: str, *, key: str = "", body: Any = None) -> tuple[int, dict[str, Any]]:
    """Status and JSON; 0 when nobody is there. ``body``: POSTed as JSON."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as page:
            return page.status, json.load(page)
    except urllib.error.HTTPError as answer:
        with answer:
            return answer.code, json.load(answer)
    except (urllib.error.URLError, OSError):
        return 0, {}


def metrics(url: str) -> dict[str, float]:
    """By name with labels, as in the page."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    return {
        found[1]: float(found[2]) for line in lines if (found := re.match(r"([^#].*) (\S+)$", line))
    }


def holdings(url: str) -> dict[str, float]:
    """What a worker holds for requests."""
    found = metrics(url)
    held = {"leases": found.get("triptych_leases", 0.0)}
    for name, value in found.items():
        pool = re.fullmatch(r'triptych_pool_bytes\{pool="(\w+)",state="(\w+)"\}', name)
        if pool is not None and pool[2] in HELD:
            held[f"{pool[1]} {pool[2]}"] = value
    return held
