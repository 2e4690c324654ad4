"""A client that goes away in the middle of its request, and how long workers hold on to it."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tests.end_to_end.reference import data_uri
from tests.fault.deployed import HELD, Deployed
from tests.unit.conftest import picture

COUNTS = {"encoder": 1, "prefill": 1, "decode": 1}
OPTIONS = {
    "all": ("--dtype", "float32"),
    "encoder": ("--batch-patches", "1024", "--pool-mib", "32"),
    "prefill": ("--chunk-tokens", "32", "--kv-mib", "16"),
    "decode": ("--kv-mib", "16"),
}
"""Short steps, so that each state lasts for many of them."""
STATES = ("encode", "prefill", "decode")
REACH_S = 30.0
FREE_S = 30.0
BEGUN_S = 0.03
"""That a state has lasted when the client leaves."""
WORDS = "what do you see in this picture of a red circle and a blue square "


class Worker:
    """What one says at ``/metrics``, over a connection that stays."""

    def __init__(self, role: str, url: str) -> None:
        self.role = role
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)

    def holds(self) -> dict[str, float]:
        """What it holds or does for requests, by name; nothing when it is idle."""
        self._connection.request("GET", "/metrics")
        page = self._connection.getresponse().read().decode()
        found = {}
        for name, value in re.findall(r"^(triptych_\S+) (\S+)$", page, re.M):
            pool = re.fullmatch(r'triptych_pool_bytes\{pool="(\w+)",state="(\w+)"\}', name)
            if pool is not None and pool[2] in HELD:
                found[f"{pool[1]} {pool[2]}"] = float(value)
            elif name == "triptych_leases" or name.startswith("triptych_encoder_queue"):
                found[name] = float(value)
        return {name: value for name, value in found.items() if value}

    def close(self) -> None:
        self._connection.close()


@dataclass(frozen=True)
class Left:
    state: str
    stream: bool
    free_s: dict[str, float]
    """By role: from the end of the client's connection until it held nothing."""

    @property
    def all_s(self) -> float:
        return max(self.free_s.values())


class Leaving:
    """``with Leaving(deployed) as leaving:`` sends requests and goes away."""

    def __init__(self, deployed: Deployed) -> None:
        self._deployed = deployed
        self._number = 0

    def __enter__(self) -> Leaving:
        self.workers = {m["role"]: Worker(m["role"], m["url"]) for m in self._deployed.members()}
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in self.workers.values():
            worker.close()

    def leave(self, state: str, *, stream: bool) -> Left:
        """Send a request, wait until it is in ``state``, close the connection."""
        self._number += 1
        target = urlsplit(self._deployed.url)
        with socket.create_connection((target.hostname, target.port), timeout=REACH_S) as client:
            client.sendall(self._request(state, stream))
            self._wait(lambda: self._reached(state), f"nothing is in {state}")
            time.sleep(BEGUN_S)
            assert self._reached(state), f"{state} was over before the client left"
        gone = time.monotonic()
        free_s: dict[str, float] = {}

        def free() -> bool:
            for role, worker in self.workers.items():
                if role not in free_s and not worker.holds():
                    free_s[role] = time.monotonic() - gone
            return len(free_s) == len(self.workers)

        self._wait(free, f"not free after {state}")
        assert not any(worker.holds() for worker in self.workers.values())
        return Left(state, stream, free_s)

    def _wait(self, condition: Callable[[], bool], failure: str) -> None:
        end = time.monotonic() + REACH_S
        while not condition():
            held = {role: worker.holds() for role, worker in self.workers.items()}
            assert time.monotonic() < end, f"{failure}: {held}"

    def _reached(self, state: str) -> bool:
        """Has the only request come to it, and not beyond?"""
        held = {role: worker.holds() for role, worker in self.workers.items()}
        encoding = any("queue" in name for name in held["encoder"])
        if state == "encode":
            return encoding
        if state == "prefill":
            return not encoding and "kv pinned" in held["prefill"]
        return not held["prefill"] and "kv pinned" in held["decode"]

    def _request(self, state: str, stream: bool) -> bytes:
        """As HTTP/1.1; every one has images and a prompt that nobody has seen."""
        seeds = range(100 * self._number, 100 * self._number + (10 if state == "encode" else 1))
        words = 1500 if state == "prefill" else 10
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_uri(picture(seed, 448, 448))}}
            for seed in seeds
        ]
        parts.insert(0, {"type": "text", "text": f"{self._number} " + WORDS * (words // 15)})
        body = json.dumps(
            {
                "model": str(self._deployed.model),
                "messages": [{"role": "user", "content": parts}],
                "max_tokens": 800,
                "temperature": 0,
                "stream": stream,
                "ignore_eos": True,
            }
        ).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {urlsplit(self._deployed.url).netloc}"
            f"\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body
