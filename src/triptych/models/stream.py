"""Work queued on a device by one thread, and waiting for it. On a CPU there is never any left."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from triptych.errors import DeviceLost, TriptychError

logger = logging.getLogger(__name__)
URGENT = -1
"""Priority of a stream whose kernels go before those of others."""
STAND_BACK = 5
"""Steps of priority (as ``nice`` counts) that computing threads are below event loops."""


class Stream:
    """A CUDA stream of its owner's; on a CPU, nothing."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def entered(self) -> AbstractContextManager[object]:
        """Kernels of this thread go to the stream while this is entered."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def mark(self) -> Callable[[], float]:
        """A function that waits until all that was queued before is computed, and returns the
        wall-clock time at which the host saw it."""
        if self._stream is None:
            now = time.time()
            return lambda: now
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)

        def wait() -> float:
            event.synchronize()
            return time.time()

        return wait


def settle(device: torch.device, threads: int = 0) -> None:
    """Before the calling thread computes: streams, kernels and captures that name no device are
    ``device``'s, and operations on a CPU use ``threads`` (0: as they would)."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if threads:
        torch.set_num_threads(threads)


def settle_thread(device: torch.device, threads: int = 0) -> None:
    """``settle`` a thread that does nothing else but compute on ``device``, and give what it queues
    a stream of its own.

    The device's default stream is no place to compute: copies that name no stream, a transfer
    engine's, wait for all that is queued there, and all that is queued there waits for them. The
    thread's stream goes before a ``Stream``: what answers are made of before what encodes for later
    ones, where both share a GPU.
    """
    settle(device, threads)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what other threads have queued: the weights
        torch.cuda.set_stream(torch.cuda.Stream(device, priority=URGENT))  # type: ignore[no-untyped-call]
    else:
        stand_back()


def stand_back() -> None:
    """Let event loops, this process's and others', have a core before the calling thread and those
    that it starts. They want one for a millisecond now and then; it computes whenever it may, and
    where cores are few they came after it, and again wherever it had stopped with Python's lock.
    Idempotent; its own threads may have been started by one that stands back already.
    """
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        loops = os.getpriority(os.PRIO_PROCESS, os.getpid())  # the main thread's
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), loops + STAND_BACK)


def drain(device: torch.device) -> bool:
    """Wait until nothing that this process has queued can touch the device's memory any more.

    False: the device has failed for this process (a kernel's illegal access, say). It computes
    nothing more, and no later call of this process will succeed.
    """
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as exc:
            logger.critical("%s has failed: %s", device, exc)
            return False
    return True


def failure(device: torch.device, message: str) -> TriptychError:
    """The error for work that failed on the device, once nothing can touch its memory any more:
    ``DeviceLost`` if no other work can succeed either."""
    return TriptychError(message) if drain(device) else DeviceLost(message)
