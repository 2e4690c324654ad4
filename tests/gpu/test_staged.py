"""``shm`` between GPU memories of two processes, through page-locked buffers."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import torch

from tests.staged_process import content
from tests.transfer_rig import FAST
from triptych.errors import TransferFailed
from triptych.transfer.device_region import open_region
from triptych.transfer.region import PAGE, BaseRegion
from triptych.transfer.transports.base import Peer, Read, probe
from triptych.transfer.transports.shm_device import StagedLink, StagedTransport
from triptych.transfer.transports.staging import CudaCopier
from triptych.wire import TransportOffer

CUDA = torch.device("cuda", 0)
LAST = torch.device("cuda", max(0, torch.cuda.device_count() - 1))
NBYTES = 256 << 20
AT = 2 * PAGE
TIMEOUT_S = 20.0
PEER = Peer("", "", "")


@contextmanager
def producer() -> Iterator[tuple[subprocess.Popen[bytes], TransportOffer]]:
    """On the last GPU."""
    command = [sys.executable, "-m", "tests.staged_process", str(NBYTES), str(LAST)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdin is not None
        try:
            yield child, msgspec.json.decode(child.stdout.readline(), type=TransportOffer)
        finally:
            child.send_signal(signal.SIGCONT)
            child.stdin.close()
            child.wait(TIMEOUT_S)


def connect(offer: TransportOffer, region: BaseRegion) -> StagedLink:
    link = StagedTransport(region).connect(offer, PEER, FAST)
    assert isinstance(link, StagedLink)
    probe(link, region, "n" * 32, TIMEOUT_S)
    return link


def test_blocks_come_from_another_process_in_any_order() -> None:
    size = 300 << 10
    count = NBYTES // size
    region = open_region(NBYTES, "t" * 32, CUDA)
    with producer() as (_, offer):
        link = connect(offer, region)
        link.read(
            [Read(AT + i * size, AT + (count - 1 - i) * size, size) for i in range(count)],
            TIMEOUT_S,
        )
        got = region.tensor(AT, (count, size), torch.uint8).flip(0).cpu()
        link.close()
    assert torch.equal(got, content(NBYTES)[: count * size].view(count, size))


def test_stopped_then_killed_in_the_middle_of_a_read() -> None:
    region = open_region(NBYTES, "t" * 32, CUDA)
    memory = region.tensor(AT, (NBYTES,), torch.uint8)
    whole = [Read(AT, AT, NBYTES)]
    with producer() as (child, offer):
        link = connect(offer, region)

        def until_it_fails() -> TransferFailed:
            with pytest.raises(TransferFailed) as caught:
                while True:
                    link.read(whole, 2.0)
            assert caught.value.quarantine_s == 0
            return caught.value

        threading.Timer(0.3, child.send_signal, [signal.SIGSTOP]).start()
        assert "not read within" in until_it_fails().message
        memory.zero_()
        torch.cuda.synchronize(CUDA)
        time.sleep(0.2)
        assert not memory.any()
        child.send_signal(signal.SIGCONT)
        link.read(whole, TIMEOUT_S)
        assert torch.equal(memory.cpu(), content(NBYTES))
        threading.Timer(0.3, child.kill).start()
        assert "the peer is lost" in until_it_fails().message
        link.close()
    with producer() as (_, offer):
        connect(offer, region).close()


def test_the_buffers_are_page_locked_for_as_long_as_the_link_is_open() -> None:
    region = open_region(PAGE, "n" * 32, CUDA)
    transport = StagedTransport(region)
    link = connect(transport.offer(), region)
    assert all(buffer.is_pinned() for buffer in link._staging._buffers)
    link.close()
    transport.close()
    assert "triptych-staging" not in Path("/proc/self/maps").read_text(encoding="ascii")


def test_what_cannot_be_page_locked_is_an_error_and_no_later_one() -> None:
    copier = CudaCopier(CUDA)
    with pytest.raises(RuntimeError):
        copier.lock(PAGE, PAGE)
    assert int(torch.ones(4, device=CUDA).sum()) == 4


def test_reads_do_not_wait_for_kernels() -> None:
    """The default stream is busy for seconds; a read of 64 MiB is not."""
    region = open_region(64 << 20, "n" * 32, CUDA)
    transport = StagedTransport(region)
    link = connect(transport.offer(), region)
    link.read([Read(AT, AT, 32 << 20)], TIMEOUT_S)
    busy = torch.cuda.Event()
    with torch.cuda.device(CUDA):
        torch.cuda._sleep(4_000_000_000)
        busy.record()
    link.read([Read(AT, AT, 32 << 20)], TIMEOUT_S)
    assert not busy.query()
    busy.synchronize()
    link.close()
    transport.close()
