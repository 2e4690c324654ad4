"""The router process: the OpenAI API outside, the workers' channels inside."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import secrets as random
from contextlib import suppress

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from triptych import wire
from triptych.config import RouterConfig, Secrets
from triptych.errors import Unauthorized, UnknownModel
from triptych.observe import exposition
from triptych.router.answers import ModelCard, ModelList
from triptych.router.chat import ChatEndpoint, error_response
from triptych.router.inbox import Inboxes
from triptych.router.membership import Membership
from triptych.router.openapi import document, page
from triptych.router.operating import Operating
from triptych.router.pipeline import Pipeline
from triptych.router.prompt import Prompter
from triptych.router.timelines import Timelines
from triptych.stage.shell import SPANS_S
from triptych.transfer.channel import Channel, Sessions
from triptych.transfer.handshake import Listener

logger = logging.getLogger(__name__)
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""The page of ``/docs`` runs nothing and loads nothing."""
CHAT = "/v1/chat/completions"


class Router:
    """Everything a router is, but for its listening socket."""

    def __init__(
        self,
        config: RouterConfig,
        secrets: Secrets,
        prompter: Prompter,
        identity: wire.ModelIdentity,
    ) -> None:
        """``identity``: of the model that is served."""
        self._config = config
        self._secrets = secrets
        self._worker_id = f"router-{os.getpid()}"
        self._nonce = random.token_hex(16)
        self.membership = Membership(identity)
        self._inboxes = Inboxes()
        self.timelines = Timelines()
        self._pipeline = Pipeline(config, prompter, self.membership, self._inboxes, self.timelines)
        self._served_name = config.served_name or config.model.model
        self.chat = ChatEndpoint(
            config, self._served_name, prompter, self._pipeline, self.timelines
        )
        listener = Listener(
            secret=secrets.shared,
            timeouts=config.timeouts,
            sessions=Sessions(),
            welcome=self._welcome,
            check=self.membership.check,
            on_open=self.membership.opened,
            on_message=self._on_message,
            on_lost=self.membership.lost,
        )
        self._document = document()
        chat = _Guarded(self.chat, secrets)
        others = Starlette(
            routes=[
                Route(CHAT, chat, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._models),
                Route("/v1/requests/{request_id}/timeline", self._timeline),
                Route("/openapi.json", self._openapi),
                Route("/docs", self._docs),
                Route("/health", self._health),
                *Operating(config, secrets, self.membership).routes,
                Route("/metrics", self._metrics),
                WebSocketRoute("/channel", listener.accept),
            ]
        )
        self.app: ASGIApp = _Shortcut(chat, others)

    async def drain(self) -> None:
        """Take no new requests, and wait for the running ones for ``timeouts.drain`` at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._config.timeouts.drain):
                await self.chat.drain()

    async def close(self) -> None:
        await self._pipeline.close()

    # ------------------------------------------------------------------ workers

    def _welcome(self) -> wire.Welcome:
        return wire.Welcome(
            session="", role="router", worker_id=self._worker_id, process=self._nonce, proof=""
        )

    def _on_message(self, channel: Channel, message: wire.ChannelMessage) -> None:
        worker = self.membership.hear(channel)
        if worker is None:
            return
        if isinstance(message, wire.Tokens):
            self._inboxes.tokens(worker, message)
        elif isinstance(message, wire.Failed):
            self._inboxes.failed(worker, message)
        elif isinstance(message, wire.Spans):
            self.timelines.add(message.request_id, message.spans)
        elif isinstance(message, wire.Draining):
            self.membership.drain(worker, done=message.done)

    # ------------------------------------------------------------------ clients

    async def _models(self, request: Request) -> Response:
        try:
            authorize(request, self._secrets)
        except Unauthorized as error:
            return error_response(error)
        model = ModelCard(self._served_name)
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse(msgspec.to_builtins(ModelList((model,))))
        try:
            self.chat.check_model(name)
        except UnknownModel as error:
            return error_response(error)
        return JSONResponse(msgspec.to_builtins(model))

    async def _timeline(self, request: Request) -> Response:
        try:
            authorize(request, self._secrets)
        except Unauthorized as error:
            return error_response(error)
        request_id = str(request.path_params["request_id"]).removeprefix("chatcmpl-")
        await asyncio.sleep(2 * SPANS_S)  # the workers' last spans may be on their way
        found = self.timelines.describe(request_id)
        if found is None:
            return JSONResponse({"error": f"no request {request_id} is remembered"}, 404)
        return JSONResponse(found)

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(self._document)

    async def _docs(self, request: Request) -> Response:
        return HTMLResponse(page(self._document), headers={"content-security-policy": PAGE_POLICY})

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "role": "router", "pid": os.getpid()})

    async def _metrics(self, request: Request) -> Response:
        return Response(exposition.render(), media_type=exposition.CONTENT_TYPE)


class _Shortcut:
    """Chat requests past the framework, whose layers every token of a stream would go through."""

    def __init__(self, chat: ASGIApp, others: ASGIApp) -> None:
        self._chat = chat
        self._others = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_chat = scope["type"] == "http" and scope["path"] == CHAT and scope["method"] == "POST"
        await (self._chat if is_chat else self._others)(scope, receive, send)


class _Guarded:
    """An endpoint that asks for the API key first."""

    def __init__(self, endpoint: ChatEndpoint, secrets: Secrets) -> None:
        self._endpoint = endpoint
        self._secrets = secrets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            authorize(Request(scope), self._secrets)
        except Unauthorized as error:
            await error_response(error)(scope, receive, send)
            return
        await self._endpoint(scope, receive, send)


def authorize(request: Request, secrets: Secrets) -> None:
    """Raises Unauthorized unless the request carries the API key, if one is set."""
    if secrets.api_key is None:
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    if not hmac.compare_digest(given.encode(), secrets.api_key.encode()):
        raise Unauthorized("the API key is missing or wrong")
