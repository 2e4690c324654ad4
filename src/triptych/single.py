"""Roles inside this process: one of them, or the EPD topology's three on one event loop.

The roles of EPD are the same code as everywhere else and talk over real sockets; what is saved
is processes, not steps. That makes it the reference that the other topologies are compared with.
"""

from __future__ import annotations

import asyncio
import importlib
import signal
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from triptych.config import RouterConfig, Secrets, ServeConfig
from triptych.launch import free_port, role_configs


class Worker(Protocol):
    """What a worker role's module makes: bound to its address, its model loaded."""

    async def serve(self, *, handle_signals: bool = True) -> None: ...

    def stop(self) -> None: ...


def create_worker(role: str, config: Any, secrets: Secrets) -> Worker:
    """The worker of a role. Only now is the role's module imported, and with it torch.

    Blocks while the model loads. Raises ConfigError and UnsupportedModel.
    """
    made: Worker = importlib.import_module(f"triptych.{role}.server").create(config, secrets)
    return made


async def serve_router(config: RouterConfig, secrets: Secrets, *, handle_signals: bool) -> None:
    """The router until cancelled or, with ``handle_signals``, SIGTERM or SIGINT."""
    app = importlib.import_module("triptych.router.app")
    await app.serve(config, secrets, handle_signals=handle_signals)


async def run_role(role: str, config: Any, secrets: Secrets) -> None:
    """One role until SIGTERM or SIGINT. Raises what keeps it from starting."""
    if role == "router":
        await serve_router(config, secrets, handle_signals=True)
    else:
        await create_worker(role, config, secrets).serve()


async def serve(config: ServeConfig, secrets: Secrets) -> None:
    """Router, encoder and language worker on this loop until SIGTERM or SIGINT.

    Raises what keeps one of them from starting, or ended it.
    """
    configs = role_configs(replace(config, port=config.port or free_port(config.host)))
    workers = [create_worker(role, configs[role][0], secrets) for role in ("encoder", "language")]
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    router = serve_router(configs["router"][0], secrets, handle_signals=False)
    await _serve_until(stop, asyncio.create_task(router), workers)


async def _serve_until(
    stop: asyncio.Event, router: asyncio.Task[None], workers: Sequence[Worker]
) -> None:
    """All at once, until ``stop`` or until one ends; the router ends before its workers."""
    running = [asyncio.create_task(worker.serve(handle_signals=False)) for worker in workers]
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({stopping, router, *running}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    router.cancel()  # it ends when its requests have
    await asyncio.wait({router})
    for worker, task in zip(workers, running, strict=True):
        worker.stop()
        await asyncio.wait({task})
    for task in (router, *running):
        if not task.cancelled():
            task.result()
