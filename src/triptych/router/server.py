"""The router as a process runs it: its socket, its life, its end."""

from __future__ import annotations

import asyncio
import signal

from triptych.config import RouterConfig, Secrets
from triptych.models.identity import router_identity
from triptych.router.app import Router
from triptych.router.prompt import Prompter
from triptych.stage.http import HttpServer, bind, url_of


class RouterServer:
    """A router bound to its address, tokenizer and template loaded, not serving yet."""

    def __init__(self, config: RouterConfig, secrets: Secrets) -> None:
        """Raises ConfigError when the address cannot be had or the tokenizer not be read."""
        self._socket = bind(config.host, config.port)
        try:
            self._router = Router(
                config, secrets, Prompter(config.model), router_identity(config.model)
            )
        except BaseException:
            self._socket.close()
            raise
        self._drain_s = config.timeouts.drain
        self._stopping = asyncio.Event()
        self.url = url_of(self._socket)

    async def serve(self, *, handle_signals: bool = True) -> None:
        """Until ``stop`` or, with ``handle_signals``, SIGTERM or SIGINT; then drain."""
        if handle_signals:
            loop = asyncio.get_running_loop()
            for name in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(name, self.stop)
        server = HttpServer(self._router.app, self._socket, self._drain_s)
        serving = asyncio.create_task(server.run_until_stopped())
        try:
            await self._stopping.wait()
        finally:
            await self._router.drain()
            server.stop()
            await serving
            await self._router.close()

    def stop(self) -> None:
        self._stopping.set()


def create(config: RouterConfig, secrets: Secrets) -> RouterServer:
    """Load the tokenizer and put the router together. Blocks for seconds."""
    return RouterServer(config, secrets)
