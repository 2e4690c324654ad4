"""GPU memory of a process that its peers read, and the choice between it and host memory.

The region is a CUDA allocation of its own: what is exported to a peer by CUDA IPC is the whole
``cudaMalloc`` segment around an address, and memory of torch's expandable segments cannot be
exported at all. Bytes that pass through the host do so on streams of the region's own, so that
they wait neither for kernels nor for each other's direction.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import torch

from triptych.errors import ConfigError
from triptych.transfer.region import PAGE, BaseRegion, Region, probe_page

logger = logging.getLogger(__name__)

STAGE_NBYTES = 4 << 20
"""Page-locked host memory through which bytes go to the device."""


def open_region(nbytes: int, nonce: str, device: torch.device) -> BaseRegion:
    """A region with room for areas of ``nbytes`` on ``device``.

    Raises ConfigError when there is not enough memory, or none of a kind that can be lent.
    """
    if device.type == "cpu":
        return Region(nbytes, nonce)
    if device.type == "cuda":
        return DeviceRegion(nbytes, nonce, device)
    raise ConfigError(f"memory of a {device.type} device cannot be lent to other processes")


class DeviceRegion(BaseRegion):
    """Memory of one GPU, all of it taken and zero when this returns.

    Raises ConfigError when there is not enough, or when the allocation shares its segment.
    """

    def __init__(self, nbytes: int, nonce: str, device: torch.device) -> None:
        super().__init__(nbytes, nonce)
        self.device = torch.device("cuda", device.index or 0)
        with torch.cuda.device(self.device):
            free, _ = torch.cuda.mem_get_info()
            if self.nbytes > free:
                raise ConfigError(
                    f"cannot take {self.nbytes >> 20} MiB of {self.device}: only "
                    f"{free >> 20} MiB are free"
                )
            pool = torch.cuda.MemPool()
            with torch.cuda.use_mem_pool(pool, self.device):
                self._memory = torch.zeros(self.nbytes, dtype=torch.uint8, device=self.device)
            self._pool = pool
            self._to_host = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._to_device = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self.address = self._memory.data_ptr()
            first = torch.frombuffer(bytearray(probe_page(nonce)), dtype=torch.uint8)
            self._memory[:PAGE].copy_(first)
            torch.cuda.synchronize()
            _check_alone(self.address, self.nbytes)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        self.check(offset, nbytes)
        return self._memory[offset : offset + nbytes].view(dtype).view(shape)

    def read(self, offset: int, nbytes: int) -> bytes:
        self.check(offset, nbytes)
        if nbytes == 0:
            return b""
        with torch.cuda.stream(self._to_host):
            host = _page_locked(nbytes)
            host.copy_(self._memory[offset : offset + nbytes], non_blocking=True)
        self._to_host.synchronize()
        return host.numpy().tobytes()

    def incoming(self, offset: int, nbytes: int) -> Iterator[memoryview]:
        self.check(offset, nbytes)
        with torch.cuda.device(self.device):
            host = _page_locked(min(nbytes, STAGE_NBYTES))
        part = host.numpy().data
        for start in range(0, nbytes, STAGE_NBYTES):
            step = min(STAGE_NBYTES, nbytes - start)
            yield part[:step]
            with torch.cuda.stream(self._to_device):
                target = self._memory[offset + start : offset + start + step]
                target.copy_(host[:step], non_blocking=True)
            self._to_device.synchronize()

    def close(self) -> None:
        """The memory goes with the region and the last tensor in it."""


def _page_locked(nbytes: int) -> torch.Tensor:
    """(nbytes,) uint8. torch keeps such memory for the next who asks."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _check_alone(address: int, nbytes: int) -> None:
    """Raises ConfigError if a peer that may read the region could read something else with it."""
    for segment in torch.cuda.memory_snapshot():  # type: ignore[no-untyped-call]
        start, size = int(segment["address"]), int(segment["total_size"])
        if not start <= address < start + size:
            continue
        if segment.get("is_expandable"):
            raise ConfigError(
                "memory of torch's expandable segments cannot be lent: take "
                "expandable_segments:True out of PYTORCH_CUDA_ALLOC_CONF"
            )
        if sum(str(block["state"]).startswith("active") for block in segment["blocks"]) > 1:
            raise ConfigError("the region's GPU memory is not an allocation of its own")
        logger.info("%d MiB of GPU memory in a segment of %d MiB", nbytes >> 20, size >> 20)
        return
    logger.warning("torch does not list the segment of the region's GPU memory")
