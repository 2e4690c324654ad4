"""How the engine is chosen and asked, with a stand-in for the package: without a GPU."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY

from tests.transfer_rig import FAST
from triptych.errors import ConfigError, TransferFailed
from triptych.observe.metrics import transport_info
from triptych.transfer.region import PAGE, Region
from triptych.transfer.transports import mooncake
from triptych.transfer.transports.base import Peer, Read, TransportUnavailable
from triptych.transfer.transports.choice import open_transports
from triptych.transfer.transports.mooncake import MooncakeTransport, has_nvlink
from triptych.transfer.transports.shm_device import StagedTransport

PEER = Peer("http://x:1", "", "")
CUDA = torch.device("cuda", 0)


class FakeEngine:
    """Of version 0.3.14: over NVLink it refuses memory that it does not know to be a GPU's."""

    status = 0
    calls: list[int]
    names: list[str]

    def __init__(self) -> None:
        self.calls, self.names = [], []

    def initialize(self, *arguments: str) -> int:
        return 0

    def get_rpc_port(self) -> int:
        return 12345

    def batch_register_memory(self, addresses: list[int], sizes: list[int]) -> int:
        nvlink = "MC_INTRANODE_NVLINK" in os.environ and "MC_FORCE_TCP" not in os.environ
        return -1 if nvlink and sizes == [PAGE] else 0

    def batch_unregister_memory(self, addresses: list[int]) -> int:
        return 0

    def batch_transfer_sync_read(
        self, name: str, targets: list[int], sources: list[int], sizes: list[int]
    ) -> int:
        self.calls.append(len(sizes))
        self.names.append(name)
        for target, source, nbytes in zip(targets, sources, sizes, strict=True):
            ctypes.memmove(target, source, nbytes)
        return self.status


class DeviceLike(Region):
    """Host memory that says it is a GPU's."""

    device = CUDA


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake: Any = ModuleType("mooncake.engine")
    fake.TransferEngine = FakeEngine
    fake.SUPPORT_CUDA = fake.SUPPORT_INTRA_NVLINK = True
    monkeypatch.setitem(sys.modules, "mooncake.engine", fake)
    monkeypatch.setattr(mooncake, "_engines", [])
    monkeypatch.setattr(mooncake, "_lives", {})
    monkeypatch.setattr(mooncake, "_has_adapters", lambda: False)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MC_")}
    monkeypatch.setattr(os, "environ", kept)
    monkeypatch.setattr(mooncake, "_current", lambda device: mooncake.nullcontext())
    return fake


def region(nbytes: int = 4 << 20) -> DeviceLike:
    return DeviceLike(nbytes, "n" * 32)


def kinds(name: Any) -> list[str]:
    return list(open_transports(name, region(), url="http://127.0.0.1:1", host="127.0.0.1"))


def test_device_memory_moves_by_nvlink(package: Any) -> None:
    source, target = region(), region()
    producer, consumer = (MooncakeTransport(each, "127.0.0.1") for each in (source, target))
    assert producer.offer().protocol == "nvlink"
    assert (os.environ["MC_INTRANODE_NVLINK"], os.environ["MC_INTRA_NVLINK"]) == ("1", "1")
    assert "MC_FORCE_TCP" not in os.environ
    link = consumer.connect(producer.offer(), PEER, FAST)
    source.view(2 * PAGE, 3000)[:] = bytes(range(250)) * 12
    reads = [Read(2 * PAGE + 10 * i, 2 * PAGE + 10 * (299 - i), 10) for i in range(300)]
    link.read([*reads, Read(0, 0, 0)], 1.0)
    parts = [bytes(source.view(read.remote, 10)) for read in reversed(reads)]
    assert bytes(target.view(2 * PAGE, 3000)) == b"".join(parts)
    assert mooncake._engines[0].engine.calls == [256, 44]


def test_a_read_that_fails_is_not_safe_at_once(package: Any) -> None:
    transport = MooncakeTransport(region(), "127.0.0.1")
    link = transport.connect(transport.offer(), PEER, FAST)
    mooncake._engines[0].engine.status = -1
    with pytest.raises(TransferFailed, match="status -1") as caught:
        link.read([Read(0, 0, 64)], 1.0)
    assert caught.value.quarantine_s > 0


def test_nothing_is_read_after_the_peer_is_lost_or_the_time_is_up(package: Any) -> None:
    transport = MooncakeTransport(region(), "127.0.0.1")
    link = transport.connect(transport.offer(), PEER, FAST)
    with pytest.raises(TransferFailed, match="not read within") as caught:
        link.read([Read(0, 0, 64)], -1.0)
    assert caught.value.quarantine_s == 0
    link.abort()
    with pytest.raises(TransferFailed, match="lost"):
        link.read([Read(0, 0, 64)], 1.0)
    assert mooncake._engines[0].engine.calls == []


def test_what_cannot_be_reached_is_refused(package: Any) -> None:
    transport = MooncakeTransport(region(), "127.0.0.1")
    offer = transport.offer()
    fields = {name: getattr(offer, name) for name in offer.__struct_fields__}
    for change, reason in (
        ({"host": "elsewhere"}, "another host"),
        ({"protocol": "tcp"}, "'tcp', this one by 'nvlink'"),
        ({"address": "nowhere"}, "not an engine's address"),
    ):
        with pytest.raises(TransportUnavailable, match=reason):
            transport.connect(type(offer)(**{**fields, **change}), PEER, FAST)


def test_what_the_user_has_set_stays(package: Any) -> None:
    os.environ["MC_FORCE_TCP"] = "1"
    assert MooncakeTransport(region(), "127.0.0.1").offer().protocol == "tcp"
    assert "MC_INTRANODE_NVLINK" not in os.environ


def test_what_is_in_effect_counts_and_not_what_was_asked_for(
    package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "batch_register_memory", lambda self, *arguments: 0)
    assert MooncakeTransport(region(), "127.0.0.1").offer().protocol == "tcp"
    assert "MC_INTRANODE_NVLINK" in os.environ


def test_host_memory_never_asks_for_nvlink(package: Any) -> None:
    host = Region(PAGE, "n" * 32)
    assert MooncakeTransport(host, "127.0.0.1").offer().protocol == "tcp"
    assert os.environ["MC_FORCE_TCP"] == "1"


def test_a_package_without_cuda_is_a_clear_error(
    package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triptych.transfer.transports.choice.Region", type("Other", (), {}))
    package.SUPPORT_CUDA = package.SUPPORT_INTRA_NVLINK = False
    with pytest.raises(ConfigError, match="mooncake-cuda"):
        MooncakeTransport(region(), "127.0.0.1")
    assert not has_nvlink()
    assert kinds("auto") == ["shm", "http"]


def test_transports_of_device_memory(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # The stand-in is host memory and would be taken for it.
    monkeypatch.setattr("triptych.transfer.transports.choice.Region", type("Other", (), {}))
    assert kinds("auto") == ["mooncake", "shm", "http"]
    assert kinds("http") == ["http"]
    assert kinds("mooncake") == ["mooncake"]
    shm = open_transports("shm", region(), url="http://127.0.0.1:1", host="127.0.0.1")
    assert list(shm) == ["shm"]
    assert isinstance(shm["shm"], StagedTransport)


def test_auto_does_not_take_an_unauthenticated_protocol(
    package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triptych.transfer.transports.choice.Region", type("Other", (), {}))
    os.environ["MC_FORCE_TCP"] = "1"
    assert kinds("auto") == ["shm", "http"]


def test_the_protocol_in_effect_is_a_metric(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the one that was asked for: NVLink's settings are there, and TCP is what the engine is
    found to use."""
    monkeypatch.setattr("triptych.transfer.transports.choice.Region", type("Other", (), {}))

    def shown(protocol: str) -> float | None:
        labels = {"transport": "mooncake", "protocol": protocol}
        return REGISTRY.get_sample_value("triptych_transport_info", labels)

    transport_info.clear()
    assert kinds("mooncake") == ["mooncake"]
    assert (shown("nvlink"), shown("tcp")) == (1, None)
    transport_info.clear()
    monkeypatch.setattr(mooncake, "_engines", [])
    monkeypatch.setattr(FakeEngine, "batch_register_memory", lambda self, *arguments: 0)
    assert kinds("mooncake") == ["mooncake"]
    assert (shown("nvlink"), shown("tcp")) == (None, 1)
    transport_info.clear()
    assert kinds("auto") == ["shm", "http"]  # one that was looked at and left out is not shown
    assert (shown("nvlink"), shown("tcp")) == (None, None)
    for labels in (
        {"transport": "http", "protocol": ""},
        {"transport": "shm", "protocol": "staged"},
    ):
        assert REGISTRY.get_sample_value("triptych_transport_info", labels) == 1


def test_a_process_that_has_the_port_of_one_that_is_gone_has_another_name(package: Any) -> None:
    transport = MooncakeTransport(region(), "10.0.0.8")
    offer = transport.offer()
    for nonce in ("a", "a", "b", "a", "c"):
        link = transport.connect(offer, Peer("http://x:1", "", "", nonce), FAST)
        link.read([Read(0, 0, 64)], 1.0)
    names = ["10.0.0.8", "10.0.0.8", "0x0a.0.0.8", "10.0.0.8", "0x00a.0.0.8"]
    assert mooncake._engines[0].engine.names == [f"{name}:12345" for name in names]


@pytest.mark.parametrize(("host", "n"), [("127.0.0.1", 4096), ("localhost", 512)])
def test_every_spelling_of_an_address_leads_to_it(host: str, n: int) -> None:
    spelled = {mooncake.respelled(f"{host}:20123", number) for number in range(n)}
    assert len(spelled) == n and f"{host}:20123" in spelled
    for each in spelled:
        name, _, port = each.rpartition(":")
        found = socket.getaddrinfo(name, port, socket.AF_INET, socket.SOCK_STREAM)
        assert [where[4] for where in found] == [("127.0.0.1", 20123)]


def test_what_has_no_other_spelling_stays() -> None:
    assert mooncake.respelled("::1:20123", 3) == "::1:20123"
