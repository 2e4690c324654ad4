"""Same host, GPU memory: bytes pass through page-locked memory that two processes share.

A consumer connects to the producer's socket (``host_socket``) and gets a memfd of a few buffers,
made for this link alone (``staging``). It asks for ranges of the producer's region, a buffer at a
time; a thread of the producer copies them there and answers when they have come; the consumer
copies them on. Two copy engines and two processes work at once, each on another buffer.

Who may read is decided once, when a peer connects: any process of this user, as with ``shm``
between host memories, and then all of the region. ``http`` serves only what is ready and claimed.

Nobody but the consumer's own process writes to its region: once its copies are done a failed read
leaves nothing behind. Answers carry the number of the request, so one that comes too late is
known, and a buffer that a late request fills is filled anew before anybody reads it: the
producer's copies keep the order of the requests.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from triptych.config import Timeouts
from triptych.errors import TransferFailed
from triptych.transfer.mover import STUCK_QUARANTINE_S
from triptych.transfer.region import BaseRegion
from triptych.transfer.transports.base import (
    Link,
    Peer,
    Read,
    TransportUnavailable,
    check_bounds,
    host_id,
)
from triptych.transfer.transports.host_socket import connect, fetch_region, receive_memfd
from triptych.transfer.transports.staging import LAYOUT, Layout, Staging
from triptych.transfer.transports.staging_server import (
    ANSWER,
    HEADER,
    MAGIC,
    RANGE,
    RANGES,
    REQUEST,
    StagingServer,
)
from triptych.wire import TransportOffer

STAGED = "staged"
"""The offer's protocol where the region is not host memory that could be mapped."""
_LEAST = 512 << 10
"""A read is cut for the copies to overlap, but a smaller cut costs more than it gains."""
_MOST = 1 << 30
"""Bytes of buffers that a consumer locks on a producer's word."""


class StagedTransport:
    """For a region on a GPU. ``layout``: of the buffers of each link that peers make to us."""

    kind = "shm"
    protocol = STAGED

    def __init__(self, region: BaseRegion, layout: Layout = LAYOUT) -> None:
        self._region = region
        self._layout = layout
        self._server: StagingServer | None = None

    def offer(self) -> TransportOffer:
        if self._server is None:
            self._server = StagingServer(self._region, self._layout)
        name, nbytes = self._server.name, self._region.nbytes
        return TransportOffer(self.kind, host_id(), name, nbytes=nbytes, protocol=STAGED)

    def connect(self, offer: TransportOffer, peer: Peer, timeouts: Timeouts) -> Link:
        if offer.host != host_id():
            raise TransportUnavailable("the peer is on another host")
        if offer.protocol == STAGED:
            return connect_staged(offer, self._region, timeouts)
        if offer.protocol:
            raise TransportUnavailable(f"the peer's memory is {offer.protocol!r}")
        try:
            return MappedLink(fetch_region(offer, timeouts.connect), offer.nbytes, self._region)
        except (OSError, ValueError) as exc:
            raise TransportUnavailable(f"{offer.address}: {exc}") from exc

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None


def connect_staged(offer: TransportOffer, region: BaseRegion, timeouts: Timeouts) -> StagedLink:
    """A link from a GPU's memory to ours, on whatever device. Raises TransportUnavailable."""
    peer = None
    try:
        peer = connect(offer.address, timeouts.connect)
        header, fd = receive_memfd(peer, HEADER.size)
        try:
            return StagedLink(peer, _staging(header, fd, offer, region), offer.nbytes, region)
        finally:
            os.close(fd)
    except (OSError, ValueError, RuntimeError) as exc:
        if peer is not None:
            peer.close()
        raise TransportUnavailable(f"{offer.address}: {exc}") from exc


def _staging(header: bytes, fd: int, offer: TransportOffer, region: BaseRegion) -> Staging:
    """Raises OSError, RuntimeError, or ValueError when it is not what was offered."""
    magic, nbytes, buffers, size = HEADER.unpack(header)
    if magic != MAGIC or nbytes != offer.nbytes:
        raise ValueError(f"not the region offered: {nbytes} bytes, {magic!r}")
    layout = Layout(buffers, size)
    if buffers < 2 or size < 1 or layout.total > _MOST:
        raise ValueError(f"buffers that cannot be used: {layout}")
    return Staging(fd, layout, region)


class _Asked(NamedTuple):
    """A request without an answer."""

    number: int
    buffer: int
    part: Sequence[Read]


class StagedLink:
    """``peer``: the connection to the producer's thread for this link; taken over, as is
    ``staging``."""

    memory = None

    def __init__(
        self, peer: socket.socket, staging: Staging, nbytes: int, region: BaseRegion
    ) -> None:
        self._peer = peer
        self._staging = staging
        self._nbytes = nbytes
        self._region = region
        self._number = 0
        """Of the last request."""
        self._aborted = False

    def read(self, pieces: Sequence[Read], timeout_s: float) -> None:
        check_bounds(pieces, self._nbytes, self._region)
        deadline = time.monotonic() + timeout_s
        try:
            try:
                self._move(pieces, deadline)
            finally:
                self._staging.drain()
        except TimeoutError as exc:
            raise TransferFailed(f"not read within {timeout_s:g} s") from exc
        except OSError as exc:
            raise TransferFailed(f"the peer is lost: {exc}") from exc
        except RuntimeError as exc:
            # Whether anything still moves on a device that has failed is not known.
            raise TransferFailed(
                f"copying to {self._region.device} failed: {exc}", quarantine_s=STUCK_QUARANTINE_S
            ) from exc

    def abort(self) -> None:
        self._aborted = True
        with suppress(OSError):  # closed by now
            self._peer.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._nbytes = 0
        self._staging.close()
        self._peer.close()

    def _move(self, pieces: Sequence[Read], deadline: float) -> None:
        """All but one of the buffers are with the producer, to be filled; from that one our copies
        are on their way while the next answer is awaited."""
        count, nbytes = self._staging.layout
        total = sum(piece.nbytes for piece in pieces)
        asked: deque[_Asked] = deque()
        for index, part in enumerate(cut(pieces, min(nbytes, max(_LEAST, -(-total // count))))):
            if len(asked) == count - 1:
                self._land(asked.popleft(), deadline)
            buffer = index % count
            self._staging.wait(buffer)
            asked.append(self._ask(buffer, part, deadline))
        while asked:
            self._land(asked.popleft(), deadline)

    def _ask(self, buffer: int, part: Sequence[Read], deadline: float) -> _Asked:
        self._number += 1
        request = [REQUEST.pack(self._number, buffer)]
        request += [RANGE.pack(piece.remote, piece.nbytes) for piece in part]
        self._limit(deadline)
        self._peer.send(b"".join(request))
        return _Asked(self._number, buffer, part)

    def _land(self, asked: _Asked, deadline: float) -> None:
        """Wait for the answer, then start copying the buffer to where its bytes belong."""
        number = 0
        while number < asked.number:  # those before belong to a read that has failed
            self._limit(deadline)
            answer = self._peer.recv(ANSWER.size)
            if len(answer) != ANSWER.size:
                raise TransferFailed("the peer is lost: it has closed the link")
            (number,) = ANSWER.unpack(answer)
        if number != asked.number:
            raise TransferFailed(f"the peer answered request {number}, not {asked.number}")
        self._staging.empty(asked.buffer, [(piece.local, piece.nbytes) for piece in asked.part])

    def _limit(self, deadline: float) -> None:
        """The next wait for the peer ends at the deadline. Raises TimeoutError after it."""
        if self._aborted:
            raise TransferFailed("the peer is lost")
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("out of time")
        self._peer.settimeout(left)


def cut(pieces: Sequence[Read], nbytes: int) -> Iterator[list[Read]]:
    """Pieces in order, those that are too large in several, as many together as a buffer of
    ``nbytes`` and a request hold."""
    part: list[Read] = []
    room = nbytes
    for remote, local, left in pieces:
        while left:
            step = min(left, room)
            part.append(Read(remote, local, step))
            remote, local, left, room = remote + step, local + step, left - step, room - step
            if room == 0 or len(part) == RANGES:
                yield part
                part, room = [], nbytes
    if part:
        yield part


class MappedLink:
    """From a peer's host memory, which is mapped, to ours on a GPU.

    ``fd``: the producer's memfd, taken over (closed here).
    """

    memory = None

    def __init__(self, fd: int, nbytes: int, region: BaseRegion) -> None:
        try:
            self._map = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(fd)
        self._address: int = np.frombuffer(self._map, dtype=np.uint8).ctypes.data
        self._nbytes = nbytes
        self._region = region

    def read(self, pieces: Sequence[Read], timeout_s: float) -> None:
        check_bounds(pieces, self._nbytes, self._region)
        deadline = time.monotonic() + timeout_s
        for remote, local, nbytes in (piece for piece in pieces if piece.nbytes):
            source = self._address + remote
            for part in self._region.incoming(local, nbytes):
                if time.monotonic() > deadline:
                    raise TransferFailed(f"not copied within {timeout_s:g} s")
                target = ctypes.addressof(ctypes.c_char.from_buffer(part))
                ctypes.memmove(target, source, len(part))
                source += len(part)

    def abort(self) -> None:
        """A copy waits for nobody, and the mapping stays whatever becomes of the peer."""

    def close(self) -> None:
        self._nbytes = 0
        self._map.close()
