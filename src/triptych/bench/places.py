"""The memory that ``triptych bench transfer`` reads and copies between, on any device."""

from __future__ import annotations

import secrets
import time

import torch

from triptych.errors import ConfigError, TransferFailed
from triptych.transfer.device_region import open_region
from triptych.transfer.region import PAGE, round_up

SEED = 7
_STEP = 16 << 20
"""Bytes of content made at once."""


def device_of(name: str) -> torch.device:
    """Raises ConfigError unless there is such a device here. CUDA devices get their index."""
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise ConfigError(f"device {name!r}: {exc}") from exc
    if device.type != "cuda":
        return device
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        raise ConfigError(f"device {name!r}: there are {count} CUDA devices")
    return torch.device("cuda", index)


def fill(memory: torch.Tensor) -> None:
    """Random content for (n,) uint8, n a multiple of 8: the same in every process and on every
    device. It is there when this returns."""
    generator = torch.Generator().manual_seed(SEED)
    for start in range(0, len(memory), _STEP):
        part = memory[start : start + _STEP]
        words = torch.empty(len(part) // 8, dtype=torch.int64).random_(generator=generator)
        part.copy_(words.view(torch.uint8))
    synchronize(memory.device)


def synchronize(*devices: torch.device) -> None:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


class Places:
    """Of the consumer's process: a region for what is read, on ``device``, and memory of the same
    kind and content as the producer's, on ``producer_device``, for the copy beside it.

    Raises ConfigError when there is not enough memory for both.
    """

    def __init__(self, nbytes: int, device: torch.device, producer_device: torch.device) -> None:
        area = round_up(nbytes)
        self.device, self.producer_device = device, producer_device
        self._devices = {device, producer_device}
        self.region = open_region(area, secrets.token_hex(16), device)
        self.offset = self.region.carve(area)
        self._target = self.region.tensor(self.offset, (area,), torch.uint8)
        self._local = open_region(area, secrets.token_hex(16), producer_device)
        self._source = self._local.tensor(self._local.carve(area), (area,), torch.uint8)
        fill(self._source)

    def offsets(self, nbytes: int, pieces: int) -> list[int]:
        """Where the pieces land: the last one first, so that no two are neighbours in order."""
        size = nbytes // pieces
        return [self.offset + (pieces - 1 - i) * size for i in range(pieces)]

    def copy(self, nbytes: int) -> float:
        """Seconds of a read's ceiling: the same bytes between the same places in one process."""
        target, source = self._target[:nbytes], self._source[:nbytes]
        begin = time.perf_counter()
        target.copy_(source)
        synchronize(*self._devices)
        return time.perf_counter() - begin

    def clear(self, nbytes: int) -> None:
        """Nothing of the content is left."""
        self._target[:nbytes].zero_()
        synchronize(self.device)

    def soil(self, nbytes: int) -> None:
        """As ``clear``, for a byte of every page only: what a copy has left is no result."""
        self._target[:nbytes:PAGE].zero_()
        synchronize(self.device)

    def check(self, nbytes: int, pieces: int) -> None:
        """Raises TransferFailed unless every piece is where ``offsets`` wanted it."""
        size = nbytes // pieces
        for i, offset in enumerate(self.offsets(nbytes, pieces)):
            start = offset - self.offset
            wanted = self._source[i * size : (i + 1) * size].to(self.device)
            if not torch.equal(self._target[start : start + size], wanted):
                raise TransferFailed(f"piece {i} of {nbytes} bytes in {pieces} arrived wrong")

    def check_view(self, memory: torch.Tensor, nbytes: int) -> None:
        """Raises TransferFailed unless ``memory``, host memory, has the content."""
        if not torch.equal(memory, self._source[:nbytes].cpu()):
            raise TransferFailed(f"{nbytes} bytes are wrong in place")

    def close(self) -> None:
        self.region.close()
        self._local.close()
