"""Reads between regions of one process, by name. The reference that other transports must equal."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from triptych.config import Timeouts
from triptych.transfer.region import Region
from triptych.transfer.transports.base import (
    Peer,
    Read,
    TransportUnavailable,
    check_bounds,
    host_id,
)
from triptych.wire import TransportOffer

_offered: WeakValueDictionary[str, Region] = WeakValueDictionary()


class MemoryTransport:
    kind = "memory"

    def __init__(self, region: Region) -> None:
        self._region = region
        self._name = secrets.token_hex(8)

    def offer(self) -> TransportOffer:
        _offered[self._name] = self._region
        return TransportOffer(self.kind, host_id(), self._name, nbytes=self._region.nbytes)

    def connect(self, offer: TransportOffer, peer: Peer, timeouts: Timeouts) -> MemoryLink:
        remote = _offered.get(offer.address)
        if remote is None:
            raise TransportUnavailable(f"no region {offer.address!r} in this process")
        return MemoryLink(remote, self._region)

    def close(self) -> None:
        _offered.pop(self._name, None)


class MemoryLink:
    def __init__(self, remote: Region, region: Region) -> None:
        self._remote = remote
        self._region = region
        self.memory: Tensor | None = remote.tensor(0, (remote.nbytes,), torch.uint8)

    def read(self, pieces: Sequence[Read], timeout_s: float) -> None:
        check_bounds(pieces, self._remote.nbytes, self._region)
        for remote, local, nbytes in pieces:
            self._region.view(local, nbytes)[:] = self._remote.view(remote, nbytes)

    def abort(self) -> None:
        """A copy waits for nobody."""

    def close(self) -> None:
        self.memory = None
