"""Same host, host memory: the producer's memfd is mapped by the consumer, reading is a memcpy.

The descriptor is passed once, over a Unix socket (``host_socket``), to processes of the same user.
The memfd is sealed (see ``region``), so a consumer can neither write to the mapping nor lose it.
A peer whose region is a GPU's is read through ``shm_device``.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import time
from collections.abc import Sequence

import torch

from triptych.config import Timeouts
from triptych.errors import TransferFailed
from triptych.transfer.region import Region
from triptych.transfer.transports.base import (
    Link,
    Peer,
    Read,
    TransportUnavailable,
    check_bounds,
    host_id,
)
from triptych.transfer.transports.host_socket import (
    REGION_HEADER,
    Server,
    fetch_region,
    send_memfd,
)
from triptych.transfer.transports.shm_device import STAGED, connect_staged
from triptych.wire import TransportOffer

_MAP_NORESERVE = 0x4000
"""linux/mman.h; Python 3.11 has no name for it. No swap is set aside for copies nobody makes."""
_STEP = 64 << 20
"""Bytes copied between two looks at the clock."""


class ShmTransport:
    kind = "shm"

    def __init__(self, region: Region) -> None:
        self._region = region
        self._server: Server | None = None
        self._fd = -1

    def offer(self) -> TransportOffer:
        if self._server is None:
            self._fd = os.dup(self._region.fd)
            self._server = Server("region", self._hand_out)
        return TransportOffer(self.kind, host_id(), self._server.name, nbytes=self._region.nbytes)

    def connect(self, offer: TransportOffer, peer: Peer, timeouts: Timeouts) -> Link:
        if offer.host != host_id():
            raise TransportUnavailable("the peer is on another host")
        if offer.protocol == STAGED:
            return connect_staged(offer, self._region, timeouts)
        try:
            return ShmLink(fetch_region(offer, timeouts.connect), offer.nbytes, self._region)
        except (OSError, ValueError) as exc:
            raise TransportUnavailable(f"{offer.address}: {exc}") from exc

    def _hand_out(self, peer: socket.socket) -> None:
        with peer:
            send_memfd(peer, REGION_HEADER, self._fd)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
            os.close(self._fd)


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
