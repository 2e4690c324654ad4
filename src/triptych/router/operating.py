"""For whoever runs the deployment: is it as it was asked for, who is in it, who is to leave."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from triptych import wire
from triptych.config import RouterConfig, Secrets
from triptych.errors import BadRequest, TriptychError, UnknownWorker
from triptych.router.membership import Membership, Worker
from triptych.router.openai import error_body
from triptych.router.placement import apart, shortfall
from triptych.stage.http import authorize_operator, drained

MAX_BODY = 4096
"""Bytes of the body of ``POST /drain``."""


class _DrainBody(msgspec.Struct, forbid_unknown_fields=True):
    worker: str


class Operating:
    """``/ready`` is open to all, as liveness checks need it; the rest asks for the operator's
    key."""

    def __init__(self, config: RouterConfig, secrets: Secrets, membership: Membership) -> None:
        self._config = config
        self._secrets = secrets
        self._membership = membership
        self._asked = {
            "encoder": config.encoders,
            "prefill": config.prefills,
            "decode": config.decodes,
            "language": config.languages,
        }

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/ready", self._ready),
            Route("/workers", self._workers),
            Route("/drain", self._drain, methods=["POST"]),
        ]

    async def _ready(self, request: Request) -> Response:
        """200 while the topology asked for is in effect; otherwise 503 and what is missing."""
        present = self._membership.present()
        lacking = shortfall(self._config.topology, self._asked, present)
        reason = f"waiting for {' and '.join(lacking)}" if lacking else self._unreadable()
        body = {
            "ready": reason is None,
            "role": "router",
            "reason": reason,
            "topology": self._config.topology,
            "workers": dict(sorted(present.items())),
        }
        return JSONResponse(body, status_code=503 if reason else 200)

    def _unreadable(self) -> str | None:
        """Why bytes cannot go where they must, if so."""

        def of(*roles: str) -> Iterable[tuple[str, Sequence[str]]]:
            workers = (worker for role in roles for worker in self._membership.workers(role))
            return [(worker.worker_id, worker.transports) for worker in workers]

        pairs = apart(of("prefill", "language"), of("encoder")) + apart(of("decode"), of("prefill"))
        return f"no transport in common: {'; '.join(pairs)}" if pairs else None

    async def _workers(self, request: Request) -> Response:
        try:
            authorize_operator(request.headers, self._secrets)
        except TriptychError as error:
            return _refusal(error)
        return JSONResponse({"workers": [_described(w) for w in self._membership.known()]})

    async def _drain(self, request: Request) -> Response:
        """Answers 200 when nothing runs on the worker any more, 202 if something still does after
        ``timeouts.drain``; asked again, it waits on."""
        try:
            authorize_operator(request.headers, self._secrets)
            worker = await self._named(request)
        except TriptychError as error:
            return _refusal(error)
        self._membership.drain(worker, done=False)
        worker.channel.send(wire.Drain())
        with suppress(TimeoutError):
            async with asyncio.timeout(self._config.timeouts.drain):
                await worker.drained.wait()
        done = worker.drained.is_set()
        return JSONResponse(drained(worker.worker_id, done), 200 if done else 202)

    async def _named(self, request: Request) -> Worker:
        """Raises BadRequest and UnknownWorker."""
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                raise BadRequest(f"the body is larger than {MAX_BODY} bytes")
        try:
            name = msgspec.json.decode(body, type=_DrainBody).worker
        except msgspec.MsgspecError as exc:
            raise BadRequest(f'the body must be {{"worker": "an id"}}: {exc}') from exc
        for worker in self._membership.known():
            if worker.worker_id == name:
                return worker
        raise UnknownWorker(f"no worker {name} is registered here", param="worker")


def _described(worker: Worker) -> dict[str, Any]:
    return {
        "id": worker.worker_id,
        "role": worker.role,
        "url": worker.url,
        "state": _state(worker),
        "load": worker.load,
        "requests": worker.users,
        "model": msgspec.to_builtins(worker.identity),
        "capacity": msgspec.to_builtins(worker.capacity),
        "transports": worker.transports,
    }


def _state(worker: Worker) -> str:
    if worker.drained.is_set():
        return "drained"
    return "draining" if worker.draining else "serving"


def _refusal(error: TriptychError) -> Response:
    return JSONResponse(error_body(error), error.status)
