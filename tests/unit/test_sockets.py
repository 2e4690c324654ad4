"""What a channel's sockets do when the peer is not there any more."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import aiohttp
import pytest

from triptych.transfer.sockets import ClientSocket


class Stuck:
    """A peer that has stopped: its half of the closing handshake never comes."""

    async def close(self) -> None:
        await asyncio.Event().wait()


class Broken:
    async def close(self) -> None:
        raise RuntimeError("half closed")


async def test_giving_up_on_a_stuck_peer_leaks_nothing() -> None:
    session = aiohttp.ClientSession()
    subject = ClientSocket(session, cast(Any, Stuck()))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await subject.close()
    assert session.closed


async def test_nor_does_an_error_while_closing() -> None:
    session = aiohttp.ClientSession()
    with pytest.raises(RuntimeError, match="half closed"):
        await ClientSocket(session, cast(Any, Broken())).close()
    assert session.closed
