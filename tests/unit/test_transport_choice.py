from __future__ import annotations

import os
import sys

import pytest

from triptych.config import TransportName
from triptych.errors import ConfigError
from triptych.transfer.region import PAGE, Region
from triptych.transfer.transports import mooncake
from triptych.transfer.transports.choice import open_transports


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


@pytest.mark.parametrize("name", ["shm", "http", "mooncake"])
def test_a_forced_transport_is_the_only_one(name: TransportName) -> None:
    assert kinds(name) == [name]


def test_without_the_package_mooncake_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake, "_engines", [])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    with pytest.raises(ConfigError, match=r"triptych\[mooncake\].*libibverbs1"):
        kinds("mooncake")
