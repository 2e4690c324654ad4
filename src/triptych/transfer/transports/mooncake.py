"""Mooncake Transfer Engine, READ: GPU memory over NVLink on one host; else RDMA, else TCP.

The engine has no authentication and listens on every interface: it is used only where it was
asked for by name, on isolated networks, and a peer is contacted only after its channel's
handshake. Its transfers are one-sided: after one that did not succeed the engine may go on writing
for a while, which ``quarantine_s`` tells.

The engine knows no CUDA streams: what is offered was seen complete by the host before, and what
was read is complete when ``read`` returns.
"""

from __future__ import annotations

import ctypes
import importlib
import ipaddress
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import torch

from triptych.config import Timeouts
from triptych.errors import ConfigError, TransferFailed
from triptych.transfer.region import BaseRegion
from triptych.transfer.transports.base import (
    Link,
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
    # Wide, so that ports are seldom drawn again: see ``_name``.
    "MC_MIN_RPC_PORT": "20000",
    "MC_MAX_RPC_PORT": "32000",
    "MC_LOG_LEVEL": "WARNING",
    "GLOG_minloglevel": "2",
}
"""Some are read when the package is loaded, some when the first engine of the process is made.
What the user has set stays."""
_NVLINK = ("MC_INTRANODE_NVLINK", "MC_INTRA_NVLINK")
"""Either name, by version; the engine then moves device memory by CUDA IPC and nothing else."""
_IN_FLIGHT = 256
"""Pieces submitted at once; the engine queues 1,024 for a peer."""
_SPINS = 20
_SLEEP_S = (20e-6, 500e-6)
"""First and longest sleep between two looks at a transfer."""


class _Engine(NamedTuple):
    engine: TransferEngine
    protocol: str
    """What it moves bytes by: "nvlink", "rdma" or "tcp"."""


_lock = threading.Lock()
_engines: list[_Engine] = []
"""At most one: the engine is one per process, whatever roles the process holds."""
_lives: dict[str, list[str]] = {}
"""By address: the nonces of the processes that have been reached there, in order."""


def has_nvlink() -> bool:
    """Whether the package is here and can move GPU memory over NVLink."""
    try:
        return bool(_package().SUPPORT_INTRA_NVLINK)
    except ConfigError as exc:
        logger.info("%s", exc.message)
        return False


def _package() -> Any:
    """Raises ConfigError."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module("mooncake.engine")
    except ImportError as exc:
        raise ConfigError(
            f"transport mooncake needs the package extra triptych[mooncake], on CUDA "
            f"triptych[mooncake-cuda], and the system libraries libibverbs1 libnuma1 libcurl4: "
            f"{exc}"
        ) from exc


def _engine(host: str, device: torch.device) -> _Engine:
    """The process's engine; the arguments count for the first call. Raises ConfigError."""
    with _lock:
        if _engines:
            return _engines[0]
        package = _package()
        if device.type == "cuda" and not package.SUPPORT_CUDA:
            raise ConfigError(
                "the Mooncake package installed moves host memory alone: GPU memory needs "
                "triptych[mooncake-cuda] in its place"
            )
        _choose(device)
        engine = package.TransferEngine()
        # The protocol's name chooses nothing here; the settings and the adapters do.
        if engine.initialize(host, "P2PHANDSHAKE", "tcp", "") != 0:
            raise ConfigError(f"the Mooncake engine does not start on {host!r}")
        protocol = _protocol(engine)
        logger.info("the Mooncake engine on %s moves bytes by %s", host, protocol)
        _engines.append(_Engine(engine, protocol))
        return _engines[0]


def _choose(device: torch.device) -> None:
    """Set what makes the engine take NVLink, RDMA or TCP; what the user has set stays."""
    adapters = _has_adapters()
    if device.type == "cuda" and not adapters and "MC_FORCE_TCP" not in os.environ:
        for name in _NVLINK:
            os.environ.setdefault(name, "1")
    elif not adapters and not any(name in os.environ for name in _NVLINK):
        os.environ.setdefault("MC_FORCE_TCP", "1")


def _has_adapters() -> bool:
    return any(Path("/sys/class/infiniband").glob("*"))


def _protocol(engine: TransferEngine) -> str:
    """What the engine has taken, whatever it was told to: it does not say, but over NVLink, and
    only then, it refuses to register memory of the host (and prints that as an error)."""
    if any(name in os.environ for name in _NVLINK):
        page = ctypes.create_string_buffer(4096)
        address = ctypes.addressof(page)
        if engine.batch_register_memory([address], [len(page)]) != 0:
            return "nvlink"
        engine.batch_unregister_memory([address])
    return "rdma" if _has_adapters() and "MC_FORCE_TCP" not in os.environ else "tcp"


def _name(address: str, nonce: str) -> str:
    """What to call the process of this nonce, which is at ``address`` now.

    The engine keeps for ever what it was first told by a name: where the memory is and which port
    reads it. A process that has drawn the port of one that is gone would be looked for where that
    one was (seen with 0.3.13). It is given a name of its own, by which the engine asks again.
    """
    with _lock:
        lives = _lives.setdefault(address, [])
        if nonce not in lives:
            lives.append(nonce)
        return respelled(address, lives.index(nonce))


def respelled(address: str, n: int) -> str:
    """The ``n``-th spelling of ``host:port``, which resolves to the same; 0: as it is.

    Parts of an IPv4 address are written as hexadecimal numbers of up to eight digits,
    as resolvers read them (inet_aton(3)); of a name some letters change their case. There are
    4,096 and two to the number of letters; what has none, as ``::1``, stays.
    """
    host, _, port = address.rpartition(":")
    try:
        parts = str(ipaddress.IPv4Address(host)).split(".")
    except ipaddress.AddressValueError:
        letters = [place for place, letter in enumerate(host) if letter.isalpha()]
        changed = {place for bit, place in enumerate(letters) if n >> bit & 1}
        spelled = (c.swapcase() if i in changed else c for i, c in enumerate(host))
        return f"{''.join(spelled)}:{port}"
    widths = [n >> 3 * place & 7 for place in range(len(parts))]
    written = [
        f"0x{int(part):0{width + 1}x}" if width else part
        for part, width in zip(parts, widths, strict=True)
    ]
    return f"{'.'.join(written)}:{port}"


class MooncakeTransport:
    """``host``: name or address under which peers reach this process's engine.

    ``protocol``: what moves the bytes. Raises ConfigError.
    """

    kind = "mooncake"

    def __init__(self, region: BaseRegion, host: str) -> None:
        self._region = region
        self._host = host
        self._registered = False
        with _current(region.device):
            self._engine, self.protocol = _engine(host, region.device)
            if self._engine.batch_register_memory([region.address], [region.nbytes]) != 0:
                raise ConfigError(
                    f"the Mooncake engine ({self.protocol}) does not register this process's "
                    f"{region.device.type} memory"
                )
        self._registered = True

    @property
    def engine(self) -> TransferEngine:
        """The engine itself, for who measures it alone."""
        return self._engine

    def offer(self) -> TransportOffer:
        return TransportOffer(
            kind=self.kind,
            host=host_id(),
            address=f"{self._host}:{self._engine.get_rpc_port()}",
            base=self._region.address,
            nbytes=self._region.nbytes,
            protocol=self.protocol,
        )

    def connect(self, offer: TransportOffer, peer: Peer, timeouts: Timeouts) -> Link:
        if ":" not in offer.address:
            raise TransportUnavailable(f"not an engine's address: {offer.address!r}")
        if offer.protocol != self.protocol:
            raise TransportUnavailable(
                f"the peer's engine moves bytes by {offer.protocol!r}, this one by "
                f"{self.protocol!r}"
            )
        if self.protocol == "nvlink" and offer.host != host_id():
            raise TransportUnavailable("NVLink does not reach a peer on another host")
        named = msgspec.structs.replace(offer, address=_name(offer.address, peer.nonce))
        link = NvlinkLink if self.protocol == "nvlink" else MooncakeLink
        return link(self._engine, named, self._region)

    def close(self) -> None:
        if self._registered:
            self._registered = False
            self._engine.batch_unregister_memory([self._region.address])


def _current(device: torch.device) -> AbstractContextManager[object]:
    """The device that CUDA calls of this thread mean, for as long as it is entered."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _EngineLink:
    """What both kinds of link know."""

    memory = None
    """Bytes move."""

    def __init__(self, engine: TransferEngine, offer: TransportOffer, region: BaseRegion) -> None:
        self._engine = engine
        self._offer = offer
        self._region = region
        self._aborted = False

    def abort(self) -> None:
        self._aborted = True

    def close(self) -> None:
        """The engine keeps its connections and what it has mapped; nothing of ours is open."""


class NvlinkLink(_EngineLink):
    """Copies between GPUs (or within one): each call returns when its copies are done."""

    def read(self, pieces: Sequence[Read], timeout_s: float) -> None:
        check_bounds(pieces, self._offer.nbytes, self._region)
        deadline = time.monotonic() + timeout_s
        wanted = [piece for piece in pieces if piece.nbytes]
        with _current(self._region.device):
            for start in range(0, len(wanted), _IN_FLIGHT):
                if self._aborted:
                    raise TransferFailed("the peer is lost")
                if time.monotonic() > deadline:
                    raise TransferFailed(f"not read within {timeout_s:g} s")
                part = wanted[start : start + _IN_FLIGHT]
                status = self._engine.batch_transfer_sync_read(
                    self._offer.address,
                    [self._region.address + piece.local for piece in part],
                    [self._offer.base + piece.remote for piece in part],
                    [piece.nbytes for piece in part],
                )
                if status != 0:
                    raise TransferFailed(
                        f"the engine ended a read with status {status}", quarantine_s=_QUARANTINE_S
                    )


class MooncakeLink(_EngineLink):
    """Reads by RDMA or TCP, submitted and polled."""

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
