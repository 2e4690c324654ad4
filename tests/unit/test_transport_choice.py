from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from triptych.config import TransportName
from triptych.errors import ConfigError
from triptych.transfer.region import PAGE, Region
from triptych.transfer.transports import choice, mooncake
from triptych.transfer.transports.choice import open_transports
from triptych.transfer.transports.shm_device import StagedTransport


def kinds(name: TransportName) -> list[str]:
    transports = open_transports(
        name, Region(PAGE, "n" * 32), url="http://127.0.0.1:1", host="127.0.0.1"
    )
    offers = [transport.offer() for transport in transports.values()]
    for transport in transports.values():
        transport.close()
    assert [offer.kind for offer in offers] == list(transports)
    return list(transports)


def test_auto_prefers_shared_memory_and_leaves_out_what_is_not_authenticated() -> None:
    assert kinds("auto") == ["shm", "http"]


@pytest.mark.parametrize("protocol", ["nvlink", "tcp", None])
def test_on_a_gpu_shared_memory_comes_after_nvlink(
    protocol: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engine:
        def __init__(self, region: object, host: str) -> None:
            self.protocol = protocol

        def close(self) -> None: ...

    monkeypatch.setattr(choice, "has_nvlink", lambda: protocol is not None)
    monkeypatch.setattr(choice, "MooncakeTransport", Engine)
    region: Any = SimpleNamespace(device=torch.device("cuda", 1))  # nobody looks into it yet
    transports = open_transports("auto", region, url="http://127.0.0.1:1", host="127.0.0.1")
    assert list(transports) == [*(["mooncake"] if protocol == "nvlink" else []), "shm", "http"]
    assert isinstance(transports["shm"], StagedTransport)
    assert list(open_transports("shm", region, url="", host="")) == ["shm"]


@pytest.mark.parametrize("name", ["shm", "http", "mooncake"])
def test_a_forced_transport_is_the_only_one(name: TransportName) -> None:
    assert kinds(name) == [name]


def test_without_the_package_mooncake_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake, "_engines", [])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    with pytest.raises(ConfigError, match=r"triptych\[mooncake\].*libibverbs1"):
        kinds("mooncake")
