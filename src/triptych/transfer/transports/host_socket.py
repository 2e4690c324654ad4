"""Unix sockets between processes of one user: how a memfd passes from one to the other.

A socket's name is random and abstract: it is no file, so a killed process leaves nothing behind,
and it is found by every container that shares the network of this one. Each side checks, by the
kernel's credentials, that the other runs as the same user.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress

from triptych.wire import TransportOffer

logger = logging.getLogger(__name__)

REGION_HEADER = b"triptych-shm"
"""Comes with the memfd of a host region."""
SEND_S = 1.0
"""A peer on the same host takes a descriptor at once or not at all."""
_PAUSE_S = 0.1
"""After the socket could not accept (no descriptors left), before it tries again."""
_CREDENTIALS = struct.Struct("3i")
"""pid, uid, gid (struct ucred)."""


class Server:
    """Accepts every process of this user, on a thread of its own.

    ``serve`` is called there with each peer, which it takes over; an OSError of it is logged.
    """

    def __init__(self, what: str, serve: Callable[[socket.socket], None]) -> None:
        self.name = f"@triptych-{secrets.token_hex(16)}"
        self._what = what
        self._serve = serve
        self._closed = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(_abstract(self.name))
        self._listener.listen(64)
        self._thread = threading.Thread(target=self._accept, name=f"{what}-offer", daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError as exc:
                if self._closed.wait(_PAUSE_S):
                    return
                logger.warning("the %s is not handed out: %s", self._what, exc)
                continue
            try:
                _check_user(peer)
                self._serve(peer)
            except OSError as exc:
                peer.close()
                logger.warning("a peer did not get the %s: %s", self._what, exc)

    def close(self) -> None:
        self._closed.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._thread.join(SEND_S + 1.0)
        self._listener.close()


def connect(address: str, timeout_s: float) -> socket.socket:
    """To a ``Server``, whose name it is. Raises OSError, also when another user's."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        client.settimeout(timeout_s)
        client.connect(_abstract(address))
        _check_user(client)
    except OSError:
        client.close()
        raise
    return client


def send_memfd(peer: socket.socket, header: bytes, fd: int) -> None:
    """Raises OSError."""
    peer.settimeout(SEND_S)
    socket.send_fds(peer, [header], [fd])


def receive_memfd(client: socket.socket, header_nbytes: int) -> tuple[bytes, int]:
    """The header and the descriptor that came with it, which is the caller's now.

    Raises OSError, or ValueError unless there is a memfd that nobody can shrink.
    """
    header, fds, _, _ = socket.recv_fds(client, header_nbytes, 1, socket.MSG_CMSG_CLOEXEC)
    if len(header) != header_nbytes or len(fds) != 1:
        for fd in fds:
            os.close(fd)
        raise ValueError("the peer hands out no memory at this address")
    try:
        seals = fcntl.fcntl(fds[0], fcntl.F_GET_SEALS)
    except OSError:
        seals = 0  # not a memfd
    if not seals & fcntl.F_SEAL_SHRINK:
        os.close(fds[0])
        raise ValueError(f"the peer's memory can be taken from under us: seals {seals:#x}")
    return header, fds[0]


def fetch_region(offer: TransportOffer, timeout_s: float) -> int:
    """The memfd of a peer's region. Raises OSError, or ValueError when it is not what was
    offered."""
    with connect(offer.address, timeout_s) as client:
        header, fd = receive_memfd(client, len(REGION_HEADER))
    size = os.fstat(fd).st_size
    if header != REGION_HEADER or size != offer.nbytes:
        os.close(fd)
        raise ValueError(f"not the region offered: {size} bytes, {header!r}")
    return fd


def _abstract(name: str) -> str:
    """The socket address that is written with an @."""
    return f"\0{name[1:]}" if name.startswith("@") else name


def _check_user(peer: socket.socket) -> None:
    """Raises PermissionError unless the other end runs as this user."""
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(credentials)
    if uid != os.getuid():
        raise PermissionError(f"the peer runs as user {uid}, this process as {os.getuid()}")
