"""A process that has drawn the port of one that is gone, which Mooncake remembers for ever."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest

from tests.transfer_rig import FAST
from triptych.transfer.region import PAGE, Region
from triptych.transfer.transports.base import Peer, Read
from triptych.transfer.transports.mooncake import MooncakeTransport
from triptych.wire import TransportOffer

CLOSED_S = 62
"""A port is free when the kernel has forgotten its last connection."""
LIFE = """
import sys, msgspec
from triptych.transfer.region import PAGE, Region
from triptych.transfer.transports.mooncake import MooncakeTransport
region = Region(4 * PAGE, "n" * 32)
region.view(2 * PAGE, PAGE)[:] = sys.argv[1].encode() * PAGE
transport = MooncakeTransport(region, "127.0.0.1")
print(msgspec.json.encode(transport.offer()).decode(), flush=True)
sys.stdin.read()
"""


@contextmanager
def life(letter: str, first: int) -> Iterator[TransportOffer]:
    """A process that lends its letters until it is killed; of ports ``first`` and the next one is
    the engine's and the other that of its memory."""
    ports = {"MC_MIN_RPC_PORT": str(first), "MC_MAX_RPC_PORT": str(first + 1)}
    process = subprocess.Popen(
        [sys.executable, "-c", LIFE, letter],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **ports},
    )
    assert process.stdout is not None
    try:
        yield msgspec.json.decode(process.stdout.readline(), type=TransportOffer)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def port_of(offer: TransportOffer) -> int:
    return int(offer.address.rpartition(":")[2])


@pytest.mark.full
def test_the_memory_behind_a_port_is_that_of_who_has_it_now() -> None:
    target = Region(4 * PAGE, "t" * 32)
    consumer = MooncakeTransport(target, "127.0.0.1")

    def reads(letter: str, offer: TransportOffer) -> None:
        link = consumer.connect(offer, Peer("http://x:1", "", "", secrets.token_hex(16)), FAST)
        link.read([Read(2 * PAGE, 2 * PAGE, PAGE)], 10.0)
        assert bytes(target.view(2 * PAGE, PAGE)) == letter.encode() * PAGE

    first = 20_001 + secrets.randbelow(11_000)
    with life("a", first) as offer:
        reads("a", offer)
    drawn = port_of(offer)
    time.sleep(CLOSED_S)
    for _ in range(20):
        # The other port is not the one by which memory was read before.
        with life("b", first - 1 if drawn == first else drawn) as again:
            if port_of(again) == drawn:
                reads("b", again)
                break
    else:
        pytest.fail("the port was not drawn again")
    consumer.close()
