"""Mooncake Transfer Engine, READ, over RDMA where the host has an adapter, else over TCP.

The engine has no authentication and listens on every interface: it is used only where it was
asked for by name, on isolated networks, and a peer is contacted only after its channel's
handshake. Its transfers are one-sided: after one that did not succeed the engine may go on writing
for a while, which ``quarantine_s`` tells.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from triptych.config import Timeouts
from triptych.errors import ConfigError, TransferFailed
from triptych.transfer.region import Region
from triptych.transfer.transports.base import (
    Peer,
    Read,
    TransportUnavailable,
    check_bounds,
    host_id,
)
from triptych.wire import TransportOffer

if TYPE_CHECKING:
    from mooncake.engine import TransferEngine

logger = logging.getLogger(__name__)

_PROGRESS_S = 5
"""The engine gives a transfer up when nothing has moved for this long."""
_OUTER_S = 30
"""The engine's own limit of a transfer; must be longer than ``_PROGRESS_S``: when it is the one to
end a transfer, bytes may arrive later."""
_QUARANTINE_S = _OUTER_S + _PROGRESS_S + 1.0
"""After any read that did not succeed, when none of what was submitted with it can still move."""
_SETTINGS = {
    "MC_TCP_ENABLE_CONNECTION_POOL": "1",
    "MC_TCP_SLICE_SIZE": str(1 << 20),
    "MC_TCP_PROGRESS_TIMEOUT_SEC": str(_PROGRESS_S),
    "MC_TCP_STATUS_TIMEOUT_SEC": str(_PROGRESS_S),
    "MC_TRANSFER_TIMEOUT": str(_OUTER_S),
    "MC_HANDSHAKE_CONNECT_TIMEOUT": "2",
    "MC_LOG_LEVEL": "WARNING",
    "GLOG_minloglevel": "2",
}
"""Read by the engine once, when the first one of the process is made."""
_IN_FLIGHT = 256
"""Pieces submitted at once; the engine queues 1,024 for a peer."""
_SPINS = 20
_SLEEP_S = (20e-6, 500e-6)
"""First and longest sleep between two looks at a transfer."""

_lock = threading.Lock()
_engines: list[TransferEngine] = []
"""At most one: the engine is one per process, whatever roles the process holds."""


def _engine(host: str) -> TransferEngine:
    """The process's engine; ``host`` counts for the first call. Raises ConfigError."""
    with _lock:
        if _engines:
            return _engines[0]
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        if not any(Path("/sys/class/infiniband").glob("*")):
            os.environ.setdefault("MC_FORCE_TCP", "1")
        try:
            from mooncake.engine import TransferEngine
        except ImportError as exc:
            raise ConfigError(
                f"transport mooncake needs the package extra triptych[mooncake] and the system "
                f"libraries libibverbs1 libnuma1 libcurl4: {exc}"
            ) from exc
        engine = TransferEngine()
        # The protocol's name chooses nothing here; the settings and the adapters do.
        if engine.initialize(host, "P2PHANDSHAKE", "tcp", "") != 0:
            raise ConfigError(f"the Mooncake engine does not start on {host!r}")
        _engines.append(engine)
        return engine


class MooncakeTransport:
    """``host``: name or address under which peers reach this process's engine."""

    kind = "mooncake"

    def __init__(self, region: Region, host: str) -> None:
        self._region = region
        self._host = host
        self._engine = _engine(host)
        self._registered = False
        if self._engine.batch_register_memory([region.address], [region.nbytes]) != 0:
            raise ConfigError("the Mooncake engine does not register this process's region")
        self._registered = True

    def offer(self) -> TransportOffer:
        address = f"{self._host}:{self._engine.get_rpc_port()}"
        region = self._region
        return TransportOffer(self.kind, host_id(), address, region.address, region.nbytes)

    def connect(self, offer: TransportOffer, peer: Peer, timeouts: Timeouts) -> MooncakeLink:
        if ":" not in offer.address:
            raise TransportUnavailable(f"not an engine's address: {offer.address!r}")
        return MooncakeLink(self._engine, offer, self._region)

    def close(self) -> None:
        if self._registered:
            self._registered = False
            self._engine.batch_unregister_memory([self._region.address])


class MooncakeLink:
    def __init__(self, engine: TransferEngine, offer: TransportOffer, region: Region) -> None:
        self._engine = engine
        self._offer = offer
        self._region = region
        self._aborted = False

    def read(self, pieces: Sequence[Read], timeout_s: float) -> None:
        check_bounds(pieces, self._offer.nbytes, self._region)
        deadline = time.monotonic() + timeout_s
        waiting = deque(piece for piece in pieces if piece.nbytes)
        running: deque[int] = deque()
        spins, sleep_s = 0, _SLEEP_S[0]
        while waiting or running:
            while waiting and len(running) < _IN_FLIGHT:
                running.append(self._submit(waiting.popleft(), bool(running)))
            status = self._engine.transfer_check_status(running[0])
            if status == 1:
                running.popleft()
                spins, sleep_s = 0, _SLEEP_S[0]
            elif status != 0:
                raise TransferFailed(
                    f"the engine ended a read with status {status}", quarantine_s=_QUARANTINE_S
                )
            elif time.monotonic() > deadline:
                raise TransferFailed(f"not read within {timeout_s:g} s", quarantine_s=_QUARANTINE_S)
            elif self._aborted:
                raise TransferFailed("the peer is lost", quarantine_s=_QUARANTINE_S)
            elif (spins := spins + 1) > _SPINS:
                time.sleep(sleep_s)
                sleep_s = min(1.5 * sleep_s, _SLEEP_S[1])

    def _submit(self, piece: Read, others_run: bool) -> int:
        """The engine's number of this read.

        One submission per piece: of a batch of several, ``transfer_check_status`` looks at the
        first alone and says done while the others are on their way (seen with 0.3.13).
        """
        if self._aborted:
            # The engine would look for the peer under a lock that reads from others need.
            raise TransferFailed(
                "the peer is lost", quarantine_s=_QUARANTINE_S if others_run else 0.0
            )
        batch: int = self._engine.batch_transfer_async_read(
            self._offer.address,
            [self._region.address + piece.local],
            [self._offer.base + piece.remote],
            [piece.nbytes],
        )
        if batch == 0:
            raise TransferFailed(
                f"the engine at {self._offer.address} cannot be reached",
                quarantine_s=_QUARANTINE_S if others_run else 0.0,
            )
        return batch

    def abort(self) -> None:
        self._aborted = True

    def close(self) -> None:
        """The engine keeps its connections; nothing of ours is open."""
