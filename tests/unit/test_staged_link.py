"""``shm`` for GPU memory, with host memory in a GPU's place: order of copies, how reads end."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from tests.staged_process import FILL_S, LAYOUT, content
from tests.staged_rig import AT, PEER, SIZE, TIMEOUT_S, Rig, eventually, late_rig, whole
from tests.transfer_rig import FAST
from triptych.errors import TransferFailed
from triptych.transfer.region import Region
from triptych.transfer.transports.base import Read, TransportUnavailable, probe
from triptych.transfer.transports.shm import ShmTransport
from triptych.transfer.transports.shm_device import cut
from triptych.transfer.transports.staging import join_neighbours
from triptych.wire import TransportOffer


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    with late_rig(monkeypatch) as subject:
        yield subject


# ---------------------------------------------------------------------- what is copied


@pytest.mark.parametrize("seed", range(4))
def test_late_copies_of_random_pieces_arrive(rig: Rig, seed: int) -> None:
    """Every buffer is used again and again, and the copies take their time on both sides."""
    draw = random.Random(seed)
    reads, at = [], AT
    while at < AT + SIZE:
        nbytes = min(draw.choice([0, 1, 100, 5000, 40_000]), AT + SIZE - at)
        reads.append(Read(draw.randrange(AT, AT + SIZE - nbytes + 1), at, nbytes))
        at += nbytes
    draw.shuffle(reads)
    link = rig.connect()
    link.read(reads, TIMEOUT_S)
    rig.check(reads)
    link.close()


def test_the_next_buffers_are_filled_while_one_is_emptied(rig: Rig) -> None:
    link = rig.connect()
    eventually(lambda: len(rig.copiers) == 2)
    ours = rig.copiers[1]
    ours.gate.clear()
    reading = threading.Thread(target=link.read, args=(whole(), TIMEOUT_S))
    reading.start()
    # None of our copies ends, yet all buffers are filled and two of them on their way.
    eventually(lambda: rig.copiers[0].started == 3 and ours.started == 2)
    assert not rig.target.view(AT, 1)[0]
    ours.gate.set()
    reading.join(TIMEOUT_S)
    rig.check(whole())
    link.close()


@pytest.mark.parametrize("seed", range(20))
def test_cut_and_join_keep_every_byte_in_its_place(seed: int) -> None:
    draw = random.Random(seed)
    reads = [
        Read(draw.randrange(100), draw.randrange(100), draw.choice([0, 1, 7, 30]))
        for _ in range(draw.randrange(40))
    ]
    size = draw.randrange(1, 25)
    parts = list(cut(reads, size))
    moved = [
        (part.remote + i, part.local + i)
        for parts in parts
        for part in parts
        for i in range(part.nbytes)
    ]
    assert moved == [(r.remote + i, r.local + i) for r in reads for i in range(r.nbytes)]
    assert all(sum(read.nbytes for read in part) == size for part in parts[:-1])
    ranges = [(read.remote, read.nbytes) for part in parts for read in part]
    joined = join_neighbours(ranges)
    assert [o + i for o, n in joined for i in range(n)] == [remote for remote, _ in moved]
    assert all(sum(a) != b[0] for a, b in zip(joined, joined[1:], strict=False))


def test_a_request_holds_only_so_many_pieces() -> None:
    reads = [Read(2 * i, 2 * i, 1) for i in range(2500)]
    parts = list(cut(reads, 1 << 20))
    assert [len(part) for part in parts] == [1024, 1024, 452]
    assert [read for part in parts for read in part] == reads


# ---------------------------------------------------------------------- how a read ends


def test_a_producer_that_does_not_answer_is_waited_for_until_the_timeout(rig: Rig) -> None:
    """And its late answers are not taken for those of the next read."""
    link = rig.connect()
    theirs = rig.copiers[0]
    theirs.gate.clear()
    start = time.monotonic()
    with pytest.raises(TransferFailed, match=r"not read within 0\.3 s") as caught:
        link.read(whole(), 0.3)
    assert 0.3 <= time.monotonic() - start < 5.0
    assert caught.value.quarantine_s == 0
    rig.source.view(AT, SIZE)[:] = random.Random(2).randbytes(SIZE)
    theirs.gate.set()
    link.read(whole(), TIMEOUT_S)
    rig.check(whole())
    link.close()


def test_nothing_is_written_any_more_when_a_read_has_failed(rig: Rig) -> None:
    """Copies that were under way have ended: what is written there afterwards stays."""
    link = rig.connect()
    eventually(lambda: len(rig.copiers) == 2)
    for _ in range(10):
        with pytest.raises(TransferFailed) as caught:
            link.read(whole(), 0.004)
        assert caught.value.quarantine_s == 0
        rig.target.view(AT, SIZE)[:] = bytes(SIZE)
        time.sleep(0.01)
        assert not any(rig.target.view(AT, SIZE))
    link.close()


def test_abort_ends_a_read_that_waits(rig: Rig) -> None:
    link = rig.connect()
    rig.copiers[0].gate.clear()
    failures: list[TransferFailed] = []

    def read() -> None:
        with pytest.raises(TransferFailed) as caught:
            link.read(whole(), TIMEOUT_S)
        failures.append(caught.value)

    reading = threading.Thread(target=read)
    reading.start()
    time.sleep(0.1)
    start = time.monotonic()
    link.abort()
    reading.join(TIMEOUT_S)
    assert time.monotonic() - start < 5.0
    assert "the peer is lost" in failures[0].message
    assert failures[0].quarantine_s == 0
    with pytest.raises(TransferFailed, match="lost"):
        link.read(whole(), TIMEOUT_S)
    link.close()
    link.abort()


def test_a_device_that_fails_here_is_an_error_with_quarantine(rig: Rig) -> None:
    link = rig.connect()
    eventually(lambda: len(rig.copiers) == 2)
    rig.copiers[1].fails = True
    with pytest.raises(TransferFailed, match="illegal memory access") as caught:
        link.read(whole(), TIMEOUT_S)
    assert caught.value.quarantine_s > 0
    link.close()


def test_a_device_that_fails_there_ends_the_link(rig: Rig) -> None:
    link = rig.connect()
    rig.copiers[0].fails = True
    with pytest.raises(TransferFailed, match="lost") as caught:
        link.read(whole(), TIMEOUT_S)
    assert caught.value.quarantine_s == 0
    link.close()


# ---------------------------------------------------------------------- other processes


@pytest.fixture
def process() -> Iterator[tuple[subprocess.Popen[bytes], TransportOffer]]:
    command = [sys.executable, "-m", "tests.staged_process", str(SIZE * 4)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdin is not None
        try:
            yield child, msgspec.json.decode(child.stdout.readline(), type=TransportOffer)
        finally:
            child.send_signal(signal.SIGCONT)  # should it be stopped
            child.stdin.close()
            child.wait(TIMEOUT_S)


def test_killed_and_stopped_in_the_middle_of_a_read(
    process: tuple[subprocess.Popen[bytes], TransportOffer],
) -> None:
    child, offer = process
    nbytes = 4 * SIZE
    region = Region(nbytes, "t" * 32)
    transport = ShmTransport(region)  # to host memory: the mixed pair, between two processes
    link = transport.connect(offer, PEER, FAST)
    probe(link, region, "n" * 32, TIMEOUT_S)
    reads = [Read(AT, AT, nbytes)]
    in_the_middle = FILL_S * nbytes / LAYOUT.nbytes / 2

    stopper = threading.Timer(in_the_middle, child.send_signal, [signal.SIGSTOP])
    stopper.start()
    start = time.monotonic()
    with pytest.raises(TransferFailed, match="not read within 1 s") as caught:
        link.read(reads, 1.0)
    assert time.monotonic() - start < 5.0
    assert caught.value.quarantine_s == 0
    child.send_signal(signal.SIGCONT)
    link.read(reads, TIMEOUT_S)
    assert torch.equal(region.tensor(AT, (nbytes,), torch.uint8), content(nbytes))

    threading.Timer(in_the_middle, child.kill).start()
    start = time.monotonic()
    with pytest.raises(TransferFailed, match="the peer is lost") as caught:
        link.read(reads, TIMEOUT_S)
    assert time.monotonic() - start < 5.0
    assert caught.value.quarantine_s == 0
    with pytest.raises(TransportUnavailable):
        transport.connect(offer, PEER, FAST)
    link.close()
    transport.close()


# ---------------------------------------------------------------------- what is left


def test_everything_is_given_back(rig: Rig) -> None:
    rig.producer.offer()
    gc.collect()
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        link = rig.connect()
        link.read(whole(), TIMEOUT_S)
        assert "triptych-staging" in Path("/proc/self/maps").read_text(encoding="ascii")
        link.close()
        link.close()
    eventually(lambda: threading.active_count() == threads)
    assert len(os.listdir("/proc/self/fd")) == before
    assert "triptych-staging" not in Path("/proc/self/maps").read_text(encoding="ascii")
    rig.producer.close()
    rig.producer.close()


def test_a_closed_transport_ends_the_links_of_its_peers(rig: Rig) -> None:
    link = rig.connect()
    rig.producer.close()
    with pytest.raises(TransferFailed, match="lost"):
        link.read(whole(), TIMEOUT_S)
    link.close()
    with pytest.raises(TransferFailed, match="outside"):
        link.read(whole(), TIMEOUT_S)
