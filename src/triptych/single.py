"""Roles inside this process: one of them, two that share a device, or the EPD topology's three.

The roles of EPD are the same code as everywhere else and talk over real sockets; what is saved
is processes, not steps. That makes it the reference that the other topologies are compared with.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib
import signal
import sys
from dataclasses import replace
from typing import Any, Protocol

from triptych import options
from triptych.config import Secrets, ServeConfig, SharedConfig
from triptych.topology import role_configs

GC_OBJECTS = 20_000
"""New objects between two looks of the collector; at Python's 700 it looks several times a request,
at messages that are about to be freed anyway."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGE_NBYTES = 32 << 20
"""Smaller allocations come from the heap; glibc takes no more here."""
KEPT_NBYTES = 256 << 20
"""So much freed memory a heap keeps for the next who asks."""
SWITCH_S = 0.0005
"""So long may a thread keep Python's lock while another waits for it; Python's own 5 ms are what an
event loop may be late by, once for every thread that computes in Python beside it."""


class Server(Protocol):
    """What every role's module makes: bound to its address, its model loaded, not serving yet."""

    url: str

    async def serve(self, *, handle_signals: bool = True) -> None: ...

    def stop(self) -> None: ...


def create(role: str, config: Any, secrets: Secrets) -> Server:
    """The server of a role. Only now is the role's module imported, and with it torch.

    Blocks while the model loads. Raises ConfigError and UnsupportedModel.
    """
    keep_freed_memory()
    made: Server = importlib.import_module(f"triptych.{role}.server").create(config, secrets)
    gc.collect()
    gc.freeze()  # what is loaded lives as long as the process: no need to search it ever again
    gc.set_threshold(GC_OBJECTS, 20, 20)
    sys.setswitchinterval(SWITCH_S)
    return made


def keep_freed_memory() -> None:
    """Arrays of some MiB come and go with every image and every step. By itself glibc returns them
    to the kernel, and the next one's pages are faulted in one by one: half of what preprocessing
    a small image took."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have none
        mallopt(_M_MMAP_THRESHOLD, LARGE_NBYTES)
        mallopt(_M_TRIM_THRESHOLD, KEPT_NBYTES)


async def run_role(role: str, config: Any, secrets: Secrets) -> None:
    """One role until SIGTERM or SIGINT. Raises what keeps it from starting."""
    await create(role, config, secrets).serve()


async def share(config: SharedConfig, secrets: Secrets) -> None:
    """An encoder and a language worker on this loop until SIGTERM or SIGINT.

    Raises ConfigError, and what keeps one of them from starting, or ended it.
    """
    for each in config.halves.values():
        options.check(each)  # the port behind the last one, say
    workers = [create(role, each, secrets) for role, each in config.halves.items()]
    await _serve_until(_asked_to_end(), *workers)


async def serve(config: ServeConfig, secrets: Secrets) -> None:
    """Router, encoder and language worker on this loop until SIGTERM or SIGINT.

    Raises what keeps one of them from starting, or ended it.
    """
    configs = role_configs(config)
    router = create("router", configs["router"][0], secrets)
    workers = []
    for role in ("encoder", "language"):
        wanted = configs[role][0]
        network = replace(wanted.network, router=router.url)
        workers.append(create(role, replace(wanted, network=network), secrets))
    await _serve_until(_asked_to_end(), router, *workers)


def _asked_to_end() -> asyncio.Event:
    """Set by SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    return stop


async def _serve_until(stop: asyncio.Event, *servers: Server) -> None:
    """All at once, until ``stop`` or until one ends; then they end in this order."""
    running = [asyncio.create_task(server.serve(handle_signals=False)) for server in servers]
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({stopping, *running}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    for server, task in zip(servers, running, strict=True):
        server.stop()
        await asyncio.wait({task})
    for task in running:
        task.result()
