"""The router as a process runs it: its sockets, its life, its end."""

from __future__ import annotations

import asyncio
import signal
import ssl

from triptych.config import RouterConfig, Secrets, TlsConfig
from triptych.errors import ConfigError
from triptych.models.identity import router_identity
from triptych.router.app import Router
from triptych.router.prompt import Prompter
from triptych.stage.http import HttpServer, bind, url_of


class RouterServer:
    """A router bound to its addresses, tokenizer and template loaded, not serving yet."""

    def __init__(self, config: RouterConfig, secrets: Secrets) -> None:
        """Raises ConfigError when an address cannot be had or the certificate or the tokenizer not
        be read."""
        self._tls = config.tls
        self._sockets = [bind(config.host, config.port)]
        try:
            if _is_wanted(config.tls):
                self._sockets.append(bind(config.tls.host, config.tls.port))
            self._router = Router(
                config, secrets, Prompter(config.model), router_identity(config.model)
            )
        except BaseException:
            for each in self._sockets:
                each.close()
            raise
        self._drain_s = config.timeouts.drain
        self._stopping = asyncio.Event()
        self.url = url_of(self._sockets[0])
        self.tls_url = (
            url_of(self._sockets[1]).replace("http", "https", 1) if len(self._sockets) > 1 else None
        )

    async def serve(self, *, handle_signals: bool = True) -> None:
        """Until ``stop`` or, with ``handle_signals``, SIGTERM or SIGINT; then drain."""
        if handle_signals:
            loop = asyncio.get_running_loop()
            for name in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(name, self.stop)
        servers = [
            HttpServer(self._router.app, each, self._drain_s, tls)
            for each, tls in zip(self._sockets, (TlsConfig(), self._tls), strict=False)
        ]
        serving = [asyncio.create_task(server.run_until_stopped()) for server in servers]
        try:
            await self._stopping.wait()
        finally:
            await self._router.drain()
            for server in servers:
                server.stop()
            await asyncio.gather(*serving)
            await self._router.close()

    def stop(self) -> None:
        self._stopping.set()


def _is_wanted(tls: TlsConfig) -> bool:
    """Raises ConfigError when what is wanted cannot be had."""
    if tls.certificate is None or tls.key is None:
        return False
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            tls.certificate, tls.key
        )
    except OSError as exc:  # as ssl.SSLError is
        raise ConfigError(f"--tls.certificate and --tls.key cannot be used: {exc}") from exc
    return True


def create(config: RouterConfig, secrets: Secrets) -> RouterServer:
    """Load the tokenizer and put the router together. Blocks for seconds."""
    return RouterServer(config, secrets)
