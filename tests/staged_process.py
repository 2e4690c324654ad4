"""A producer process whose region is read through staging memory.

``python -m tests.staged_process NBYTES [DEVICE]``: prints its offer, ends with its standard input.
By default its region is host memory in a GPU's place, and it fills its buffers slowly enough to be
stopped or killed in the middle of a read.
"""

from __future__ import annotations

import sys
import time

import msgspec
import torch

from triptych.transfer.device_region import open_region
from triptych.transfer.transports import staging
from triptych.transfer.transports.shm_device import StagedTransport
from triptych.transfer.transports.staging import HostCopier, Layout

LAYOUT = Layout(3, 64 << 10)
"""Of the buffers for host memory."""
FILL_S = 0.03
"""Of one buffer."""


class SlowCopier(HostCopier):
    def start(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> staging.Copies:
        time.sleep(FILL_S)
        return super().start(targets, sources)


def content(nbytes: int) -> torch.Tensor:
    """(nbytes,) uint8, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def main(nbytes: int, device: torch.device) -> None:
    torch.set_num_threads(1)
    if device.type == "cpu":
        staging.open_copier = lambda device: SlowCopier()
    region = open_region(nbytes, "n" * 32, device)
    memory = region.tensor(region.carve(nbytes), (nbytes,), torch.uint8)
    memory.copy_(content(nbytes))
    if memory.is_cuda:
        torch.cuda.synchronize(device)
    transport = StagedTransport(region, LAYOUT if device.type == "cpu" else staging.LAYOUT)
    sys.stdout.buffer.write(msgspec.json.encode(transport.offer()) + b"\n")
    sys.stdout.flush()
    sys.stdin.readline()
    transport.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), torch.device(*sys.argv[2:] or ["cpu"]))
