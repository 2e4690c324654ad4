"""The memory a process registers for transfers: one region, taken once at start.

A region is a memfd, so that another process on the host can map it; sealed, so that no mapping
can be pulled from under a reader and no other process can map it for writing.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import math
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch

from triptych.errors import ConfigError
from triptych.transfer.host_memory import available

PAGE = 4096
PROBE_NBYTES = 64
"""The start of a region's first page: what a peer reads to know whose memory it sees."""
SCRATCH = PAGE
"""Offset of the page into which a peer's probe is read, in cells of ``PROBE_NBYTES``."""
_FIRST = 2 * PAGE
_F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h; Python 3.11 has no name for it


def round_up(nbytes: int) -> int:
    """To whole pages: what an area of this size takes of a region."""
    return -(-nbytes // PAGE) * PAGE


def probe_page(nonce: str) -> bytes:
    """Content of a region's first page: readers compare it to know whose memory they see."""
    return f"triptych:{nonce}".encode().ljust(PAGE, b"\0")


class BaseRegion(ABC):
    """Memory of one process, wherever it is. Owned by the process that made it; peers only read it.

    ``nbytes`` of areas (each rounded up to pages) can be carved. Two pages come on top: the probe
    page at offset 0 with the process's ``nonce``, and the scratch page at ``SCRATCH``.
    """

    device: torch.device
    address: int
    """Of the first byte, in this process."""

    def __init__(self, nbytes: int, nonce: str) -> None:
        self.nbytes = round_up(nbytes) + _FIRST
        """Size of the whole mapping."""
        self.nonce = nonce
        self._next = _FIRST
        self._cells = itertools.cycle(range(SCRATCH, SCRATCH + PAGE, PROBE_NBYTES))

    def carve(self, nbytes: int) -> int:
        """Offset of a new area of ``nbytes``, aligned to pages. Areas are never given back."""
        offset, self._next = self._next, self._next + round_up(nbytes)
        if self._next > self.nbytes:
            raise ConfigError(f"a region of {self.nbytes} bytes has no room for {nbytes} more")
        return offset

    def scratch(self) -> int:
        """Offset of a cell for one probe. Any thread; a cell comes back after 63 others."""
        return next(self._cells)

    def check(self, offset: int, nbytes: int) -> None:
        """Raises ValueError unless the range lies inside the region."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ValueError(f"{offset}+{nbytes} is outside a region of {self.nbytes} bytes")

    @abstractmethod
    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The memory at ``offset`` as a tensor, without a copy. The offset must be aligned."""

    @abstractmethod
    def read(self, offset: int, nbytes: int) -> bytes:
        """A copy of the bytes in host memory. Any thread. Raises ValueError outside the region."""

    @abstractmethod
    def incoming(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        """Host memory to fill with what is to stand at ``offset``, part by part in order.

        A part is in the region when the next one is asked for. Any thread. Raises ValueError
        outside the region.
        """

    @abstractmethod
    def close(self) -> None:
        """Idempotent. Views and tensors that still exist keep the memory alive."""


class Region(BaseRegion):
    """Host memory.

    All pages are present when this returns. Raises ConfigError when there is not enough memory.
    """

    device = torch.device("cpu")

    def __init__(self, nbytes: int, nonce: str) -> None:
        super().__init__(nbytes, nonce)
        if self.nbytes > (limit := available()):
            # The kernel would rather kill some process than refuse the pages.
            raise ConfigError(
                f"cannot take {self.nbytes >> 20} MiB: only {limit >> 20} MiB are available"
            )
        self.fd = os.memfd_create("triptych", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # Without this, memory that is not there shows as SIGBUS at the first touch.
            os.posix_fallocate(self.fd, 0, self.nbytes)
        except OSError as exc:
            os.close(self.fd)
            raise ConfigError(f"cannot take {self.nbytes >> 20} MiB of memory: {exc}") from exc
        self._map = mmap.mmap(self.fd, self.nbytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._map[:PAGE] = probe_page(nonce)

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Writable bytes ``offset .. offset + nbytes``. Raises ValueError outside the region."""
        self.check(offset, nbytes)
        return memoryview(self._map)[offset : offset + nbytes]

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        count = math.prod(shape)
        view = self.view(offset, count * dtype.itemsize)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(view, dtype=dtype).view(shape)

    def read(self, offset: int, nbytes: int) -> bytes:
        return bytes(self.view(offset, nbytes))

    def incoming(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        yield self.view(offset, nbytes)

    def close(self) -> None:
        """Give up the descriptor too."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
