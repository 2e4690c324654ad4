"""``shm`` for GPU memory: who and what is refused, with host memory in a GPU's place."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

import msgspec
import pytest
import torch

from tests.staged_rig import AT, PEER, SIZE, SMALL, TIMEOUT_S, Rig, late_rig, make_rig, whole
from tests.transfer_rig import FAST
from triptych.transfer.region import PAGE
from triptych.transfer.transports import host_socket, shm_device, staging
from triptych.transfer.transports.base import TransportUnavailable
from triptych.transfer.transports.host_socket import connect, receive_memfd
from triptych.transfer.transports.staging import HostCopier
from triptych.transfer.transports.staging_server import ANSWER, HEADER, RANGE, REQUEST


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    with late_rig(monkeypatch) as subject:
        yield subject


def asking(rig: Rig) -> socket.socket:
    """A raw consumer, with its buffers."""
    client = connect(rig.producer.offer().address, TIMEOUT_S)
    _, fd = receive_memfd(client, HEADER.size)
    os.close(fd)
    return client


@pytest.mark.parametrize(
    "request_",
    [
        REQUEST.pack(1, 0) + RANGE.pack(AT + SIZE, 1),
        REQUEST.pack(1, 0) + RANGE.pack(1 << 63, 1),
        REQUEST.pack(1, 0) + RANGE.pack(AT, 64) + RANGE.pack(AT, SIZE + 1),
        REQUEST.pack(1, 0) + RANGE.pack(AT, SMALL.nbytes + 1),
        REQUEST.pack(1, 0) + RANGE.pack(AT, 0),
        REQUEST.pack(1, SMALL.buffers) + RANGE.pack(AT, 1),
        REQUEST.pack(1, 0),
        b"?",
        struct.pack("<QIQ", 1, 0, AT),
    ],
)
def test_a_request_for_what_cannot_be_had_ends_the_link(rig: Rig, request_: bytes) -> None:
    with asking(rig) as client:
        client.send(request_)
        assert client.recv(ANSWER.size) == b""
        assert not any(line.startswith("start") for line in rig.log)
    link = rig.connect()
    link.read(whole(), TIMEOUT_S)  # others are served on
    rig.check(whole())
    link.close()


def test_a_consumer_that_takes_no_answers_is_given_up(rig: Rig) -> None:
    with asking(rig) as client, pytest.raises(OSError, match="Broken pipe|reset"):
        while True:
            client.send(REQUEST.pack(1, 0) + RANGE.pack(AT, 1))


def test_another_user_is_refused_by_both_sides(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    offer = rig.producer.offer()
    uid = os.getuid()
    monkeypatch.setattr(host_socket.os, "getuid", lambda: uid + 1)
    with pytest.raises(TransportUnavailable, match="runs as user"):
        rig.consumer.connect(offer, PEER, FAST)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.settimeout(TIMEOUT_S)
        client.connect(f"\0{offer.address[1:]}")
        assert client.recv(64) == b""
    assert not rig.copiers


def test_pairs_that_cannot_work_are_refused_by_name(rig: Rig) -> None:
    offer = rig.producer.offer()
    replace = msgspec.structs.replace
    for changed, reason in [
        (replace(offer, host="elsewhere"), "another host"),
        (replace(offer, protocol="rings"), "'rings'"),
        (replace(offer, nbytes=offer.nbytes + PAGE), "not the region offered"),
        (replace(offer, protocol=""), "hands out no memory|not the region offered"),
        (replace(offer, address="@nobody"), "refused"),
    ]:
        with pytest.raises(TransportUnavailable, match=reason):
            rig.consumer.connect(changed, PEER, FAST)


@pytest.mark.parametrize("side", [0, 1])
def test_memory_that_cannot_be_page_locked_is_a_refusal(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig()

    class Unlockable(HostCopier):
        def lock(self, address: int, nbytes: int) -> None:
            raise RuntimeError("out of memory (2)")

    copiers: list[HostCopier] = []

    def open_copier(device: torch.device) -> HostCopier:
        copiers.append(Unlockable() if len(copiers) == side else HostCopier())
        return copiers[-1]

    monkeypatch.setattr(staging, "open_copier", open_copier)
    with pytest.raises(TransportUnavailable, match=["hands out no memory", "out of memory"][side]):
        rig.connect()
    rig.connect().close()
    rig.producer.close()


def test_buffers_beyond_reason_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig()
    monkeypatch.setattr(shm_device, "_MOST", SMALL.total - 1)
    with pytest.raises(TransportUnavailable, match="cannot be used"):
        rig.connect()
    rig.producer.close()
