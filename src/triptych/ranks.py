"""Ranks: the processes that hold one language half together, and the pipes between them.

The first rank is the group's *leader*: the worker that the router and its peers know. It starts
the other ranks, its *followers*, and tells them over pipes what to do.
"""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

import msgspec

M = TypeVar("M")
MAX_MESSAGE = 1 << 30
"""Bytes of the largest message: a prompt, or the blocks of a step's sequences."""
_HEADER = struct.Struct("<I")
_TIMEVAL = struct.Struct("ll")


@dataclass(frozen=True, slots=True)
class Rank:
    """Which of a group's processes one is."""

    index: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.index == 0


ALONE = Rank()


class Group(Protocol):
    """A rank's view of those that it works with."""

    @property
    def rank(self) -> Rank: ...

    def meet(self) -> None:
        """Wait until every rank is here. Raises WorkerLost for one that is not in time."""


class PipeClosed(Exception):
    """The process at the other end is gone, or does not take what it is sent."""


class Pipe:
    """Messages over a stream socket, each a msgpack body behind its length. Owns the socket.

    One thread may receive while any others send. ``send_s``: a peer that takes no bytes for this
    long is gone.
    """

    def __init__(self, end: socket.socket, send_s: float) -> None:
        end.setblocking(True)
        # Not the socket's own timeout, which would hold for receiving too.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(send_s))
        self._socket = end
        self._sending = threading.Lock()

    def send(self, message: msgspec.Struct) -> None:
        """Raises PipeClosed."""
        self.send_bytes(msgspec.msgpack.encode(message))

    def send_bytes(self, body: bytes) -> None:
        """A message that is encoded already. Raises PipeClosed."""
        with self._sending:
            try:
                self._socket.sendall(_HEADER.pack(len(body)) + body)
            except OSError as exc:
                raise PipeClosed(str(exc) or type(exc).__name__) from exc

    def receive(self, decoder: msgspec.msgpack.Decoder[M], timeout_s: float | None = None) -> M:
        """The next message. None waits for as long as the other end lives.

        Raises PipeClosed, TimeoutError.
        """
        wait = 0.0 if timeout_s is None else max(timeout_s, 0.001)  # 0 is without an end
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(wait))
        except OSError as exc:  # this end was closed between two messages
            raise PipeClosed(str(exc) or type(exc).__name__) from exc
        (length,) = _HEADER.unpack(self._exactly(_HEADER.size))
        if length > MAX_MESSAGE:
            raise PipeClosed(f"a message of {length} bytes, the limit is {MAX_MESSAGE}")
        return decoder.decode(self._exactly(length))

    def close(self) -> None:
        """Idempotent; a thread that receives sees the end."""
        with suppress(OSError):  # the other end was first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _exactly(self, count: int) -> bytearray:
        body = bytearray(count)
        view = memoryview(body)
        while view:
            try:
                got = self._socket.recv_into(view)
            except BlockingIOError:
                raise TimeoutError("nothing came in time") from None
            except OSError as exc:
                raise PipeClosed(str(exc) or type(exc).__name__) from exc
            if got == 0:
                raise PipeClosed("the other end is closed")
            view = view[got:]
        return body


def _timeval(seconds: float) -> bytes:
    whole = int(seconds)
    return _TIMEVAL.pack(whole, int((seconds - whole) * 1e6))
