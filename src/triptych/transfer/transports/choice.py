"""Which transports a process uses."""

from __future__ import annotations

from triptych.config import TransportName
from triptych.transfer.region import Region
from triptych.transfer.transports.base import Transport
from triptych.transfer.transports.http import HttpTransport
from triptych.transfer.transports.mooncake import MooncakeTransport
from triptych.transfer.transports.shm import ShmTransport


def open_transports(
    name: TransportName, region: Region, *, url: str, host: str
) -> dict[str, Transport]:
    """By kind, best first: for what this process offers and for what it reads.

    "auto" leaves out mooncake, whose TCP is not authenticated; any other name is that one alone.
    ``url``: base URL of this process's server; ``host``: its name for peers.
    Raises ConfigError when the one asked for cannot be had here.
    """
    if name == "mooncake":
        return {"mooncake": MooncakeTransport(region, host)}
    transports: dict[str, Transport] = {}
    if name in ("auto", "shm"):
        transports["shm"] = ShmTransport(region)
    if name in ("auto", "http"):
        transports["http"] = HttpTransport(region, url)
    return transports
