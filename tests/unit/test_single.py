"""Several servers on one loop: all serve, the router ends first, an error is not lost."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass, field
from typing import Any

import pytest

from triptych import single
from triptych.config import ModelConfig, NetworkConfig, Secrets, ServeConfig, SharedConfig
from triptych.errors import ConfigError, PeerRefused

SECRETS = Secrets(b"0123456789abcdef")
CONFIG = ServeConfig(ModelConfig("m"), topology="EPD", port=0)


@dataclass
class Fake:
    role: str
    config: Any
    order: list[str]
    up: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None
    url: str = "http://127.0.0.1:4321"
    stopped: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, *, handle_signals: bool = True) -> None:
        assert not handle_signals
        self.order.append(f"{self.role} up")
        if self.role == "language":
            self.up.set()
        if self.error is not None:
            raise self.error
        try:
            await self.stopped.wait()
        finally:
            await asyncio.sleep(0.01)
            self.order.append(f"{self.role} down")

    def stop(self) -> None:
        self.stopped.set()


@pytest.fixture
def up() -> asyncio.Event:
    """Set when the last of the three serves."""
    return asyncio.Event()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, up: asyncio.Event) -> dict[str, Fake]:
    servers: dict[str, Fake] = {}
    order: list[str] = []

    def create(role: str, config: Any, secrets: Secrets) -> Fake:
        servers[role] = Fake(role, config, order, up)
        return servers[role]

    monkeypatch.setattr(single, "create", create)
    return servers


async def test_a_signal_ends_the_router_before_its_workers(
    made: dict[str, Fake], up: asyncio.Event
) -> None:
    serving = asyncio.create_task(single.serve(CONFIG, SECRETS))
    await up.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(serving, 5)
    order = made["router"].order
    assert sorted(order[:3]) == ["encoder up", "language up", "router up"]
    assert order[3:] == ["router down", "encoder down", "language down"]


async def test_workers_dial_the_router_that_was_bound(
    made: dict[str, Fake], up: asyncio.Event
) -> None:
    serving = asyncio.create_task(single.serve(CONFIG, SECRETS))
    await up.wait()
    assert made["router"].config.topology == "EPD"
    for role in ("encoder", "language"):
        assert made[role].config.network.router == made["router"].url
    os.kill(os.getpid(), signal.SIGINT)
    await asyncio.wait_for(serving, 5)


async def test_two_workers_that_share_a_process(made: dict[str, Fake], up: asyncio.Event) -> None:
    network = NetworkConfig("http://r:1", port=70)
    sharing = asyncio.create_task(single.share(SharedConfig(ModelConfig("m"), network), SECRETS))
    await up.wait()
    assert list(made) == ["encoder", "language"]
    assert [each.config.network.router for each in made.values()] == ["http://r:1"] * 2
    assert [each.config.network.port for each in made.values()] == [70, 71]
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(sharing, 5)
    assert made["encoder"].order[2:] == ["encoder down", "language down"]


async def test_there_must_be_a_port_for_each_of_the_two(made: dict[str, Fake]) -> None:
    network = NetworkConfig("http://r:1", port=65535)
    with pytest.raises(ConfigError, match="65536"):
        await single.share(SharedConfig(ModelConfig("m"), network), SECRETS)
    assert not made


async def test_one_that_fails_ends_all_with_its_error() -> None:
    order: list[str] = []
    router = Fake("router", None, order)
    workers = [
        Fake("encoder", None, order),
        Fake("language", None, order, error=PeerRefused("other model")),
    ]
    with pytest.raises(PeerRefused, match="other model"):
        await asyncio.wait_for(single._serve_until(asyncio.Event(), router, *workers), 5)
    assert order[-2:] == ["router down", "encoder down"]
