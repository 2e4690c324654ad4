"""A producer process whose region is read through staging memory; host memory instead of a GPU's.

``python -m tests.staged_process NBYTES``: prints its offer, ends with its standard input. It fills
its buffers slowly enough to be stopped or killed in the middle of a read.
"""

from __future__ import annotations

import sys
import time

import msgspec
import torch

from triptych.transfer.region import Region
from triptych.transfer.transports import staging
from triptych.transfer.transports.shm_device import StagedTransport
from triptych.transfer.transports.staging import HostCopier, Layout

LAYOUT = Layout(3, 64 << 10)
FILL_S = 0.01
"""Of one buffer."""


class SlowCopier(HostCopier):
    def start(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> staging.Copies:
        time.sleep(FILL_S)
        return super().start(targets, sources)


def content(nbytes: int) -> torch.Tensor:
    """(nbytes,) uint8, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def main(nbytes: int) -> None:
    torch.set_num_threads(1)
    staging.open_copier = lambda device: SlowCopier()
    region = Region(nbytes, "n" * 32)
    region.tensor(region.carve(nbytes), (nbytes,), torch.uint8).copy_(content(nbytes))
    transport = StagedTransport(region, LAYOUT)
    sys.stdout.buffer.write(msgspec.json.encode(transport.offer()) + b"\n")
    sys.stdout.flush()
    sys.stdin.readline()
    transport.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
