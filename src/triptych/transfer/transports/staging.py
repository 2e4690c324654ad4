"""Page-locked host memory through which bytes of a region pass to a peer's region.

A few buffers in one memfd that two processes have mapped. The side whose bytes they are *fills*
buffers from its region, the other *empties* them into its own; both copy asynchronously, so that
the next buffer is filled while the last one is emptied. All CUDA calls of this are in
``CudaCopier``; ``HostCopier`` stands in its place where the region is host memory.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import mmap
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import torch

from triptych.transfer.region import BaseRegion

logger = logging.getLogger(__name__)

Range = tuple[int, int]
"""(offset in a region, nbytes)."""


class Layout(NamedTuple):
    """Buffers of one link. With two or three in flight each copy engine has always one to do."""

    buffers: int = 4
    """At least 2."""
    nbytes: int = 4 << 20
    """Of each."""

    @property
    def total(self) -> int:
        return self.buffers * self.nbytes


LAYOUT = Layout()


class Copies(Protocol):
    """Some that were started."""

    def synchronize(self) -> None:
        """Return when they are done. Raises RuntimeError."""


class Copier(Protocol):
    """Copies between a region's memory and page-locked host memory. Used on one thread."""

    def lock(self, address: int, nbytes: int) -> None:
        """Lock the pages of a shared mapping. Raises RuntimeError."""

    def unlock(self, address: int) -> None:
        """Raises RuntimeError."""

    def start(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> Copies:
        """Copy (n,) uint8 tensors, after all that were started before. Raises RuntimeError."""

    def drain(self) -> None:
        """Return when nothing that was started can move any more. Raises RuntimeError."""


class HostCopier:
    """Copies at once, with this thread alone; host memory needs no lock for that."""

    def lock(self, address: int, nbytes: int) -> None: ...

    def unlock(self, address: int) -> None: ...

    def start(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> Copies:
        for target, source in zip(targets, sources, strict=True):
            ctypes.memmove(target.data_ptr(), source.data_ptr(), source.numel())
        return _Done()

    def drain(self) -> None: ...


class _Done:
    def synchronize(self) -> None: ...


class CudaCopier:
    """Copies on a stream of its own, which waits for no kernel and no other link.

    Every call selects the device itself: it is the calling thread's, and threads start on the
    first one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def lock(self, address: int, nbytes: int) -> None:
        with torch.cuda.device(self._device):
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            try:
                torch.cuda.check_error(runtime.cudaHostRegister(address, nbytes, 0))
            except RuntimeError:
                with suppress(RuntimeError):  # the runtime tells it once more, to the next kernel
                    torch.ones(1, device=self._device)
                raise

    def unlock(self, address: int) -> None:
        with torch.cuda.device(self._device):
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            torch.cuda.check_error(runtime.cudaHostUnregister(address))

    def start(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> Copies:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            # One call for all: with one for each, this thread would have to win Python's lock
            # back from the engine's as often as there are pieces.
            torch._foreach_copy_(targets, sources, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        return done

    def drain(self) -> None:
        self._stream.synchronize()


def open_copier(device: torch.device) -> Copier:
    return CudaCopier(device) if device.type == "cuda" else HostCopier()


def create_buffers(layout: Layout) -> int:
    """A memfd with room for them, all pages present, its size sealed. Raises OSError."""
    fd = os.memfd_create("triptych-staging", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(fd, 0, layout.total)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except OSError:
        os.close(fd)
        raise
    return fd


class Staging:
    """One side's mapping of the buffers, and the copies between them and ``region``.

    ``fd`` stays the caller's. Used on one thread. Raises OSError, ValueError (the memfd is smaller
    than the layout) or RuntimeError (it cannot be page-locked).
    """

    def __init__(self, fd: int, layout: Layout, region: BaseRegion) -> None:
        self.layout = layout
        self._memory = region.tensor(0, (region.nbytes,), torch.uint8)
        self._copier = open_copier(region.device)
        # Shared: page-locking a private mapping would lock copies of its pages. Writable on both
        # sides: not every driver page-locks a mapping that is for reading alone.
        mapping = mmap.mmap(fd, layout.total, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        memory = torch.frombuffer(mapping, dtype=torch.uint8)
        self._address = memory.data_ptr()
        self._copier.lock(self._address, layout.total)
        self._buffers: Sequence[torch.Tensor] = torch.split(memory, layout.nbytes)
        """They hold the mapping, which goes with the last of them."""
        self._copies: list[Copies] = [_Done()] * layout.buffers
        """The last from or to each buffer."""

    def fill(self, buffer: int, ranges: Iterable[Range]) -> None:
        """Start copying ranges of the region to the buffer, one behind the other."""
        parts, pieces = self._pair(buffer, ranges)
        self._copies[buffer] = self._copier.start(parts, pieces)

    def empty(self, buffer: int, ranges: Iterable[Range]) -> None:
        """Start copying what stands in the buffer, one behind the other, to ranges of the
        region."""
        parts, pieces = self._pair(buffer, ranges)
        self._copies[buffer] = self._copier.start(pieces, parts)

    def wait(self, buffer: int) -> None:
        """Return when the last copies from or to this buffer are done."""
        self._copies[buffer].synchronize()

    def drain(self) -> None:
        """Return when no copy can move any more."""
        self._copier.drain()

    def close(self) -> None:
        """Wait for the copies, unlock, unmap. Idempotent."""
        if not self._buffers:
            return
        try:
            self._copier.drain()
            self._copier.unlock(self._address)
        except RuntimeError as exc:  # the device has failed: nothing moves there any more
            logger.warning("page-locked memory is not given back: %s", exc)
        self._buffers, self._copies = (), []

    def _pair(
        self, buffer: int, ranges: Iterable[Range]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The buffer's parts and the region's pieces, (n,) uint8 each."""
        found = join_neighbours(ranges)
        sizes = [nbytes for _, nbytes in found]
        parts = torch.split(self._buffers[buffer][: sum(sizes)], sizes)
        return list(parts), [self._memory[offset : offset + nbytes] for offset, nbytes in found]


def join_neighbours(ranges: Iterable[Range]) -> Sequence[Range]:
    """The same bytes in the same order, in as few ranges as that takes."""
    joined: list[Range] = []
    for offset, nbytes in ranges:
        if joined and sum(joined[-1]) == offset:
            joined[-1] = (joined[-1][0], joined[-1][1] + nbytes)
        else:
            joined.append((offset, nbytes))
    return joined
