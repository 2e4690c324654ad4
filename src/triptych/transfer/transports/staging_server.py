"""The producer's side of ``shm`` for GPU memory: fills a consumer's buffers as it asks.

Its messages are a datagram each. A request names a buffer and the ranges of the region that are to
stand in it, one behind the other; the answer says that they do. Requests are carried out, and
answered, in their order.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
from collections import deque
from contextlib import closing, suppress

from triptych.transfer.region import BaseRegion
from triptych.transfer.transports.host_socket import Server, send_memfd
from triptych.transfer.transports.staging import Layout, Range, Staging, create_buffers

logger = logging.getLogger(__name__)

HEADER = struct.Struct("<16sQIQ")
"""Magic, bytes of the region, number of buffers, bytes of each."""
MAGIC = b"triptych-staging"
REQUEST = struct.Struct("<QI")
"""Number, buffer; behind it the ranges."""
RANGE = struct.Struct("<QQ")
ANSWER = struct.Struct("<Q")
"""Number of the request whose bytes are in its buffer."""
RANGES = 1024
"""Of one request: keeps it well below what a socket takes at once."""
_REQUEST_NBYTES = REQUEST.size + RANGES * RANGE.size
_JOIN_S = 1.0


class StagingServer:
    """Gives every consumer its buffers and a thread that fills them."""

    def __init__(self, region: BaseRegion, layout: Layout) -> None:
        self._region = region
        self._layout = layout
        self._lock = threading.Lock()
        self._peers: dict[socket.socket, threading.Thread] = {}
        self._socket = Server("staging memory", self._start)
        self.name = self._socket.name

    def _start(self, peer: socket.socket) -> None:
        thread = threading.Thread(target=self._serve, args=(peer,), name="staging", daemon=True)
        with self._lock:
            self._peers[peer] = thread
        thread.start()

    def _serve(self, peer: socket.socket) -> None:
        """One consumer, until it goes."""
        try:
            with peer, closing(self._share(peer)) as staging:
                _answer(self._region, staging, peer)
        except (OSError, ValueError, RuntimeError) as exc:
            logger.warning("a peer is no longer served through staging memory: %s", exc)
        finally:
            with self._lock:
                del self._peers[peer]

    def _share(self, peer: socket.socket) -> Staging:
        """Raises OSError, RuntimeError."""
        fd = create_buffers(self._layout)
        try:
            staging = Staging(fd, self._layout, self._region)
            try:
                header = HEADER.pack(MAGIC, self._region.nbytes, *self._layout)
                send_memfd(peer, header, fd)
            except OSError:
                staging.close()
                raise
        finally:
            os.close(fd)
        peer.settimeout(None)
        return staging

    def close(self) -> None:
        """Consumers see their links end."""
        self._socket.close()
        with self._lock:
            peers = list(self._peers.items())
        for peer, thread in peers:
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)  # wakes its thread
            thread.join(_JOIN_S)


def _answer(region: BaseRegion, staging: Staging, peer: socket.socket) -> None:
    """Start what is asked for as it comes, answer as it is done. Returns when the peer has gone.

    Raises OSError, RuntimeError, or ValueError for a request that no consumer makes.
    """
    running: deque[tuple[int, int]] = deque()
    while True:
        request = None
        if len(running) < staging.layout.buffers:
            request = _next_request(peer, wait=not running)
        if request is None:
            number, buffer = running.popleft()
            staging.wait(buffer)
            peer.send(ANSWER.pack(number), socket.MSG_DONTWAIT)
            continue
        if not request:
            return
        number, buffer, ranges = _parse(request, region, staging.layout)
        staging.fill(buffer, ranges)
        running.append((number, buffer))


def _next_request(peer: socket.socket, *, wait: bool) -> bytes | None:
    """None when there is none yet; empty when there will be none."""
    try:
        return peer.recv(_REQUEST_NBYTES, 0 if wait else socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None


def _parse(request: bytes, region: BaseRegion, layout: Layout) -> tuple[int, int, list[Range]]:
    """Number, buffer and ranges. Raises ValueError unless all of it may be done."""
    if len(request) <= REQUEST.size or (len(request) - REQUEST.size) % RANGE.size:
        raise ValueError(f"a request of {len(request)} bytes")
    number, buffer = REQUEST.unpack_from(request)
    ranges = list(RANGE.iter_unpack(request[REQUEST.size :]))
    for offset, nbytes in ranges:
        region.check(offset, nbytes)
    total = sum(nbytes for _, nbytes in ranges)
    if buffer >= layout.buffers or not 0 < total <= layout.nbytes:
        raise ValueError(f"{total} bytes in buffer {buffer} of {layout}")
    return number, buffer, ranges
