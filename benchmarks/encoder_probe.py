"""How long a server's answers to GET take, and how late the kernel wakes a thread meanwhile.

    python -S -E benchmarks/encoder_probe.py HOST PORT PATH SECONDS

A process of its own with nothing else to do: whoever loads the server is too busy to measure by its
own clock. Between answers it sleeps a millisecond at a time and notes how late it wakes, which no
server can be better than where cores are few. Prints {"took": [...], "late": [...]}, in seconds.
"""

from __future__ import annotations

import json
import socket
import sys
import time

PAUSES = 5
PAUSE_S = 0.001
WAIT_S = 60.0


def get(connection: socket.socket, request: bytes) -> None:
    """One answer with a length, to its last byte."""
    connection.sendall(request)
    received = b""
    while True:
        part = connection.recv(1 << 16)
        if not part:
            raise ConnectionError("the server has closed the connection")
        received += part
        head, complete, body = received.partition(b"\r\n\r\n")
        if complete:
            lines = head.lower().split(b"\r\n")
            if b" 200 " not in lines[0]:
                raise ConnectionError(head.decode())
            (length,) = (int(line[15:]) for line in lines if line.startswith(b"content-length:"))
            if len(body) >= length:
                return


def main(host: str, port: str, path: str, seconds: str) -> None:
    request = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode()
    took, late = [], []
    with socket.create_connection((host, int(port)), WAIT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        until = time.perf_counter() + float(seconds)
        while time.perf_counter() < until:
            for _ in range(PAUSES):
                began = time.perf_counter()
                time.sleep(PAUSE_S)
                late.append(time.perf_counter() - began - PAUSE_S)
            began = time.perf_counter()
            get(connection, request)
            took.append(time.perf_counter() - began)
    sys.stdout.write(json.dumps({"took": took, "late": late}))


if __name__ == "__main__":
    main(*sys.argv[1:])
