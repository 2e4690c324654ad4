"""Same host, host memory: the producer's memfd is mapped by the consumer, reading is a memcpy.

The descriptor is passed once, over a Unix socket; each side checks that the other runs as the same
user. The socket's name is random and abstract: it is no file, so a killed process leaves nothing
behind, and it is found by every container that shares the network of this one. The memfd is sealed
(see ``region``), so a consumer can neither write to the mapping nor lose it.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import mmap
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

import torch

from triptych.config import Timeouts
from triptych.errors import TransferFailed
from triptych.transfer.region import Region
from triptych.transfer.transports.base import (
    Peer,
    Read,
    TransportUnavailable,
    check_bounds,
    host_id,
)
from triptych.wire import TransportOffer

logger = logging.getLogger(__name__)

_HEADER = b"triptych-shm"
_CREDENTIALS = struct.Struct("3i")
"""pid, uid, gid (struct ucred)."""
_SEND_S = 1.0
"""A peer on the same host takes the descriptor at once or not at all."""
_PAUSE_S = 0.1
"""After the socket could not accept (no descriptors left), before it tries again."""
_MAP_NORESERVE = 0x4000
"""linux/mman.h; Python 3.11 has no name for it. No swap is set aside for copies nobody makes."""
_STEP = 64 << 20
"""Bytes copied between two looks at the clock."""


class ShmTransport:
    kind = "shm"

    def __init__(self, region: Region) -> None:
        self._region = region
        self._server: _Server | None = None

    def offer(self) -> TransportOffer:
        if self._server is None:
            self._server = _Server(self._region)
        return TransportOffer(self.kind, host_id(), self._server.name, nbytes=self._region.nbytes)

    def connect(self, offer: TransportOffer, peer: Peer, timeouts: Timeouts) -> ShmLink:
        if offer.host != host_id():
            raise TransportUnavailable("the peer is on another host")
        try:
            return ShmLink(_fetch(offer, timeouts.connect), offer.nbytes, self._region)
        except (OSError, ValueError) as exc:
            raise TransportUnavailable(f"{offer.address}: {exc}") from exc

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None


class ShmLink:
    """``fd``: the producer's memfd, taken over (closed here).

    The mapping is copy-on-write: torch wants memory that it could write to, and whatever wrote
    would write to a copy of this process's own. Nothing does.
    """

    def __init__(self, fd: int, nbytes: int, region: Region) -> None:
        try:
            flags, prot = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            mapping = mmap.mmap(fd, nbytes, flags=flags, prot=prot)
        finally:
            os.close(fd)
        self.memory: torch.Tensor | None = torch.frombuffer(mapping, dtype=torch.uint8)
        self._region = region

    def read(self, pieces: Sequence[Read], timeout_s: float) -> None:
        memory = self.memory
        check_bounds(pieces, 0 if memory is None else len(memory), self._region)
        if memory is None:
            return
        deadline = time.monotonic() + timeout_s
        source, target = memory.data_ptr(), self._region.address
        for remote, local, nbytes in pieces:
            for start in range(0, nbytes, _STEP):
                if time.monotonic() > deadline:
                    raise TransferFailed(f"not copied within {timeout_s:g} s")
                step = min(_STEP, nbytes - start)
                ctypes.memmove(target + local + start, source + remote + start, step)

    def abort(self) -> None:
        """A copy waits for nobody, and the mapping stays whatever becomes of the peer."""

    def close(self) -> None:
        """Unmaps once no view is left: a peer that is gone must not live on as memory of this
        process."""
        self.memory = None


class _Server:
    """Hands the region's descriptor to every process of this user that asks; own thread."""

    def __init__(self, region: Region) -> None:
        self.name = f"@triptych-{secrets.token_hex(16)}"
        self._fd = os.dup(region.fd)
        self._closed = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(_abstract(self.name))
        self._listener.listen(64)
        self._thread = threading.Thread(target=self._serve, name="shm-offer", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError as exc:
                if self._closed.wait(_PAUSE_S):
                    return
                logger.warning("the region is not handed out: %s", exc)
                continue
            with peer:
                try:
                    _check_user(peer)
                    peer.settimeout(_SEND_S)
                    socket.send_fds(peer, [_HEADER], [self._fd])
                except OSError as exc:
                    logger.warning("a peer did not get the region: %s", exc)

    def close(self) -> None:
        self._closed.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._thread.join(_SEND_S + 1.0)
        self._listener.close()
        os.close(self._fd)


def _abstract(name: str) -> str:
    """The socket address that is written with an @."""
    return f"\0{name[1:]}" if name.startswith("@") else name


def _fetch(offer: TransportOffer, timeout_s: float) -> int:
    """The peer's memfd. Raises OSError, or ValueError when it is not what was offered."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(timeout_s)
        client.connect(_abstract(offer.address))
        _check_user(client)
        header, fds, _, _ = socket.recv_fds(client, len(_HEADER), 1, socket.MSG_CMSG_CLOEXEC)
    try:
        if header != _HEADER or len(fds) != 1:
            raise ValueError("no region at this address")
        size = os.fstat(fds[0]).st_size
        seals = fcntl.fcntl(fds[0], fcntl.F_GET_SEALS)
        if size != offer.nbytes or not seals & fcntl.F_SEAL_SHRINK:
            raise ValueError(f"not the region offered: {size} bytes, seals {seals:#x}")
        return fds.pop()
    finally:
        for fd in fds:
            os.close(fd)


def _check_user(peer: socket.socket) -> None:
    """Raises PermissionError unless the other end runs as this user."""
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(credentials)
    if uid != os.getuid():
        raise PermissionError(f"the peer runs as user {uid}, this process as {os.getuid()}")
