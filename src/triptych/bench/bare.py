"""The Mooncake Transfer Engine alone, beside which ``triptych bench transfer`` measures ours.

It is the same engine object with the same registered memory, settings and connections, called in
turn with our reads: an engine is one per process, and a second pair of processes would find the
machine in another state. What is absent is everything of ours: thread, bounds, deadline, channel.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from triptych.errors import TransferFailed
from triptych.transfer.region import BaseRegion
from triptych.transfer.transports.base import Read
from triptych.transfer.transports.mooncake import MooncakeTransport
from triptych.wire import TransportOffer

_SLEEP_S = (20e-6, 500e-6)
"""First and longest sleep between two looks, growing by half."""
_LIMIT_S = 60.0
_IN_FLIGHT = 512
"""Pieces submitted at once; the engine queues 1,024 for a peer."""


class BareEngine:
    """Reads by the engine's own calls: one synchronous call where the engine uses NVLink, else a
    submission for each piece (its status of a batch speaks of the first piece alone), polled.
    """

    def __init__(
        self, transport: MooncakeTransport, region: BaseRegion, offer: TransportOffer
    ) -> None:
        self._engine = transport.engine
        self._region = region
        self._synchronous = transport.protocol == "nvlink"
        self._offer = offer

    def read(self, reads: Sequence[Read]) -> float:
        """Seconds it took. Raises TransferFailed."""
        local = [self._region.address + read.local for read in reads]
        remote = [self._offer.base + read.remote for read in reads]
        sizes = [read.nbytes for read in reads]
        step = len(reads) if self._synchronous else _IN_FLIGHT
        read = self._call if self._synchronous else self._poll
        device = self._region.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            begin = time.perf_counter()
            for i in range(0, len(reads), step):
                read(local[i : i + step], remote[i : i + step], sizes[i : i + step])
            return time.perf_counter() - begin

    def _call(self, local: list[int], remote: list[int], sizes: list[int]) -> None:
        peer = self._offer.address
        if self._engine.batch_transfer_sync_read(peer, local, remote, sizes) != 0:
            raise TransferFailed("the bare engine did not read")

    def _poll(self, local: list[int], remote: list[int], sizes: list[int]) -> None:
        engine, peer = self._engine, self._offer.address
        batches = [
            engine.batch_transfer_async_read(peer, [to], [at], [size])
            for to, at, size in zip(local, remote, sizes, strict=True)
        ]
        if 0 in batches:
            raise TransferFailed("the bare engine took no read")
        deadline = time.monotonic() + _LIMIT_S
        for batch in batches:
            sleep_s = _SLEEP_S[0]
            while (status := engine.transfer_check_status(batch)) == 0:
                if time.monotonic() > deadline:
                    raise TransferFailed(f"the bare engine did not read within {_LIMIT_S:g} s")
                time.sleep(sleep_s)
                sleep_s = min(1.5 * sleep_s, _SLEEP_S[1])
            if status != 1:
                raise TransferFailed(f"the bare engine ended a read with status {status}")
