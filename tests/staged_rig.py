"""``shm`` for GPU memory between two regions of this process, with host memory in a GPU's place."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch

from tests.transfer_rig import FAST
from triptych.transfer.region import PAGE, Region
from triptych.transfer.transports import staging
from triptych.transfer.transports.base import Peer, Read
from triptych.transfer.transports.shm_device import StagedLink, StagedTransport
from triptych.transfer.transports.staging import Layout

SIZE = 256 << 10
AT = 2 * PAGE
SMALL = Layout(3, 16 << 10)
TIMEOUT_S = 10.0
PEER = Peer("", "", "")


class LateCopier:
    """Like a GPU's stream: copies come some time after they were started, in their order."""

    def __init__(self, log: list[str], delay_s: float) -> None:
        self._draw = random.Random(7)
        self._log, self._delay_s = log, delay_s
        self._queue: queue.SimpleQueue[tuple[object, ...] | None] = queue.SimpleQueue()
        self._done = [threading.Event()]
        self._done[0].set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.locked: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fails = False

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            number, targets, sources, done = job
            time.sleep(self._draw.random() * self._delay_s)
            self.gate.wait(TIMEOUT_S)
            torch._foreach_copy_(targets, sources)
            self._log.append(f"done {number}")
            done.set()  # type: ignore[attr-defined]

    def lock(self, address: int, nbytes: int) -> None:
        self.locked.append(address)

    def unlock(self, address: int) -> None:
        self.locked.remove(address)
        self._queue.put(None)

    def start(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> staging.Copies:
        if self.fails:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        done = threading.Event()
        number = len(self._done)
        self._done.append(done)
        self._log.append(f"start {number}")
        self._queue.put((number, targets, sources, done))
        return Wait(done)

    @property
    def started(self) -> int:
        return len(self._done) - 1

    def drain(self) -> None:
        assert self._done[-1].wait(TIMEOUT_S)


@dataclass
class Wait:
    done: threading.Event

    def synchronize(self) -> None:
        assert self.done.wait(TIMEOUT_S)


@dataclass
class Rig:
    source: Region
    target: Region
    producer: StagedTransport
    consumer: StagedTransport
    copiers: list[LateCopier] = field(default_factory=list)
    """One for each side of each link."""
    log: list[str] = field(default_factory=list)

    def connect(self) -> StagedLink:
        link = self.consumer.connect(self.producer.offer(), PEER, FAST)
        assert isinstance(link, StagedLink)
        return link

    def check(self, reads: list[Read]) -> None:
        expected = bytearray(SIZE)
        for remote, local, nbytes in reads:
            local -= AT
            expected[local : local + nbytes] = self.source.view(remote, nbytes)
        assert bytes(self.target.view(AT, SIZE)) == bytes(expected)


def make_rig() -> Rig:
    source, target = Region(SIZE, "s" * 32), Region(SIZE, "t" * 32)
    source.view(AT, SIZE)[:] = random.Random(1).randbytes(SIZE)
    return Rig(source, target, StagedTransport(source, SMALL), StagedTransport(target, SMALL))


def whole() -> list[Read]:
    return [Read(AT, AT, SIZE)]


def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextmanager
def late_rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """With a ``LateCopier`` on each side of each link; what they locked must be given back."""
    subject = make_rig()

    def open_copier(device: torch.device) -> LateCopier:
        subject.copiers.append(LateCopier(subject.log, delay_s=0.003))
        return subject.copiers[-1]

    monkeypatch.setattr(staging, "open_copier", open_copier)
    yield subject
    for copier in subject.copiers:
        copier.gate.set()
    subject.producer.close()
    assert [copier.locked for copier in subject.copiers] == [[]] * len(subject.copiers)
