"""A cancel that overtakes its request: nothing begins, and nothing stays."""

from __future__ import annotations

from typing import Any

import pytest

from triptych import wire
from triptych.config import NetworkConfig, Secrets, Timeouts
from triptych.errors import Cancelled
from triptych.stage import shell
from triptych.stage.cancels import REMEMBERED, Cancels

IDENTITY = wire.ModelIdentity("m", "f", "float32", "")


def test_so_many_are_remembered() -> None:
    cancels = Cancels()
    for number in range(REMEMBERED + 1):
        cancels.add(str(number))
        cancels.add(str(number))
    cancels.check("0")
    for known in ("1", str(REMEMBERED)):
        with pytest.raises(Cancelled, match=f"request {known} was cancelled"):
            cancels.check(known)


async def test_no_role_begins_what_was_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the role does with a request, it is not asked to."""
    routes: list[Any] = []
    monkeypatch.setattr(shell, "post_route", lambda path, kind, handler, *_: routes.append(handler))
    stage = shell.Stage(
        "decode",
        network=NetworkConfig(),
        timeouts=Timeouts(),
        secrets=Secrets(shared=b"x" * 32),
        identity=IDENTITY,
    )
    began, cancelled = [], []

    class Service:
        def cancel(self, request_id: str) -> None:
            cancelled.append(request_id)

    async def reserve(message: wire.ReserveRequest, channel: Any) -> wire.Message:
        began.append(message.request_id)
        return wire.ReserveResponse(n_blocks=1)

    stage.attach(Service(), wire.Capacity(), transports=())  # type: ignore[arg-type]
    stage.post("/reserve", wire.ReserveRequest, reserve)
    (handler,) = routes
    stage._on_message(None, wire.Cancel("a"))  # type: ignore[arg-type]
    with pytest.raises(Cancelled):
        await handler(wire.ReserveRequest("a", 8), None)
    await handler(wire.ReserveRequest("b", 8), None)
    assert (began, cancelled) == (["b"], ["a"])
    stage._socket.close()
