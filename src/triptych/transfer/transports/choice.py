"""Which transports a process uses."""

from __future__ import annotations

from triptych.config import TransportName
from triptych.observe.metrics import transport_info
from triptych.transfer.region import BaseRegion, Region
from triptych.transfer.transports.base import Transport
from triptych.transfer.transports.http import HttpTransport
from triptych.transfer.transports.mooncake import MooncakeTransport, has_nvlink
from triptych.transfer.transports.shm import ShmTransport
from triptych.transfer.transports.shm_device import StagedTransport


def open_transports(
    name: TransportName, region: BaseRegion, *, url: str, host: str
) -> dict[str, Transport]:
    """Those of ``_choose``, each shown in the metrics. Raises ConfigError."""
    transports = _choose(name, region, url=url, host=host)
    for kind, transport in transports.items():
        protocol = ""
        if isinstance(transport, MooncakeTransport | StagedTransport):
            protocol = transport.protocol
        transport_info.labels(kind, protocol).set(1)
    return transports


def _choose(
    name: TransportName, region: BaseRegion, *, url: str, host: str
) -> dict[str, Transport]:
    """By kind, best first: for what this process offers and for what it reads.

    "auto" leaves out mooncake where it is not NVLink: its TCP is not authenticated. Any other
    name is that one alone. ``url``: base URL of this process's server; ``host``: its name for
    peers. Raises ConfigError when the one asked for cannot be had here.
    """
    if name == "mooncake":
        return {"mooncake": MooncakeTransport(region, host)}
    transports: dict[str, Transport] = {}
    if name == "auto" and region.device.type == "cuda" and has_nvlink():
        mooncake = MooncakeTransport(region, host)
        if mooncake.protocol == "nvlink":
            transports["mooncake"] = mooncake
        else:
            mooncake.close()
    if name in ("auto", "shm"):
        if isinstance(region, Region):
            transports["shm"] = ShmTransport(region)
        else:
            transports["shm"] = StagedTransport(region)
    if name in ("auto", "http"):
        transports["http"] = HttpTransport(region, url)
    return transports
