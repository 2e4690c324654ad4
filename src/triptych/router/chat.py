"""``POST /v1/chat/completions``: body in, answer out, and an eye on whether the client is there."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets as random
import time

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from triptych.config import MIB, RouterConfig
from triptych.errors import (
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    Overloaded,
    TriptychError,
    UnknownModel,
)
from triptych.observe import metrics
from triptych.router.admission import Admission, Place
from triptych.router.answers import EVENTS, JSON, Answer, Delta, Usage, error_event
from triptych.router.body import BodyReader
from triptych.router.call import Call
from triptych.router.offload import INLINE_NBYTES, offload
from triptych.router.openai import ChatRequest, error_body, parse
from triptych.router.pipeline import Pipeline
from triptych.router.prompt import Prompter
from triptych.router.timelines import Timelines

logger = logging.getLogger(__name__)
BODY_S = 60.0
"""A client that takes longer for the next part of its body has gone."""
PART_NBYTES = 1 << 14
"""Of a body: from here on a part waits for its turn to be read."""
PARTS_AT_ONCE = 2
"""Read in one turn of the loop, of all bodies together; reading from the others pauses."""
SEND_S = 60.0
"""So has one that takes nothing of its answer for this long."""
TIMEOUT_HEADER = "X-Request-Timeout"
"""Seconds, as the body's ``timeout``."""


class ChatEndpoint:
    """ASGI application of one path."""

    def __init__(
        self,
        config: RouterConfig,
        served_name: str,
        prompter: Prompter,
        pipeline: Pipeline,
        timelines: Timelines,
    ) -> None:
        self._config = config
        self._served_name = served_name
        self._prompter = prompter
        self._pipeline = pipeline
        self._timelines = timelines
        self._admission = Admission(config.max_requests, config.max_held_mib * MIB)
        self.running = 0
        self.draining = False
        self._turns = asyncio.Semaphore(PARTS_AT_ONCE)
        self._idle = asyncio.Event()
        self._idle.set()

    async def drain(self) -> None:
        """Refuse new requests, and wait until the running ones have ended."""
        self.draining = True
        await self._idle.wait()

    def check_model(self, name: str) -> None:
        """Raises UnknownModel."""
        if name != self._served_name:
            raise UnknownModel(
                f"the model served here is {self._served_name}, not {name}", param="model"
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived = time.time()
        request_id = random.token_hex(12)
        self.running += 1
        self._idle.clear()
        metrics.requests_running.inc()
        reply = Reply(request_id, send)
        place: Place | None = None
        try:
            self._check_serving()
            place = self._admission.enter(time.monotonic())
            body = await self._body(receive, place)
            chat = await _read(body)
            self.check_model(chat.model)
            self._check_choices(chat.n_choices)
            timeout_s = _timeout_s(scope, chat.timeout, self._config.timeouts.request)
            self._timelines.open(request_id, arrived)
            call = Call(request_id, chat, arrived, timeout_s, place, inline=body.files)
            await self._answer(call, reply, receive)
        except TriptychError as error:
            if isinstance(error, Overloaded):
                least = self._admission.retry_after_s(time.monotonic())
                error.retry_after_s = max(error.retry_after_s, least)
            await reply.error(error)
        # A task's edge: a bug of ours is an answer in OpenAI's format too, and in the log.
        except Exception:
            logger.exception("request %s failed inside the router", request_id)
            await reply.error(TriptychError("internal error"))
        finally:
            if place is not None:
                place.leave(time.monotonic())
            self.running -= 1
            if self.running == 0:
                self._idle.set()
            metrics.requests_running.dec()
            metrics.requests_ended.labels(str(reply.status)).inc()

    def _check_choices(self, n: int) -> None:
        if n > self._config.max_choices:
            raise BadRequest(f"n = {n}, the limit is {self._config.max_choices}", param="n")

    def _check_serving(self) -> None:
        if self.draining:
            raise Overloaded("the server is shutting down")

    async def _body(self, receive: Receive, place: Place) -> BodyReader:
        limit = self._config.max_body_mib * MIB
        body = BodyReader()
        size = 0
        more = True
        while more:
            try:
                async with asyncio.timeout(BODY_S):
                    message = await receive()
            except TimeoutError:
                raise DeadlineExceeded(f"nothing of the body came for {BODY_S:g} s") from None
            if message["type"] == "http.disconnect":
                raise Cancelled("the client has gone")
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise BadRequest(f"the body is larger than {self._config.max_body_mib} MiB")
            place.hold(len(part), time.monotonic())
            if len(part) < PART_NBYTES:
                body.feed(part)
            else:
                async with self._turns:
                    body.feed(part)
                    await asyncio.sleep(0)  # and the next of them in the next turn of the loop
            more = message.get("more_body", False)
        return body

    async def _answer(self, call: Call, reply: Reply, receive: Receive) -> None:
        """Run the request's life beside its client: whichever ends first ends the other."""
        answer = self._new_answer(call)

        async def emit(delta: Delta) -> None:
            if call.chat.stream:
                await reply.stream(answer, delta)
            else:
                answer.add(delta)

        life = asyncio.create_task(self._pipeline.run(call, emit))
        client = asyncio.create_task(_disconnected(receive))
        client.add_done_callback(lambda _: life.cancel())
        reply.watch(life)
        try:
            await asyncio.wait((life,))  # which has a deadline of its own
            usage = _usage(life)
            metrics.prompt_tokens.inc(usage.prompt_tokens)
            metrics.completion_tokens.inc(usage.completion_tokens)
            if call.chat.stream:
                await reply.finish(answer.closing(usage))
            else:
                await reply.whole(answer.whole(usage))
        finally:
            reply.unwatch()
            client.cancel()
            life.cancel()
            await asyncio.gather(client, life, return_exceptions=True)

    def _new_answer(self, call: Call) -> Answer:
        return Answer(
            call.request_id,
            self._served_name,
            piece=self._prompter.piece,
            logprobs=call.chat.n_logprobs,
            usage_in_stream=call.chat.wants_usage,
            n_choices=call.chat.n_choices,
        )


class Reply:
    """The HTTP response of one request. Its status goes out with the first token."""

    def __init__(self, request_id: str, send: Send) -> None:
        self.status = 0
        """0 until it is sent."""
        self._request_id = request_id
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._sending_since = 0.0
        """Loop time at which the event that is being sent was begun; 0 when none is."""
        self._watch: asyncio.TimerHandle | None = None

    def watch(self, life: asyncio.Task[Usage]) -> None:
        """Cancel ``life`` if the client takes nothing of a stream for ``SEND_S``, looking now and
        then: a timeout of its own would cost each token more than the rest of its sending."""
        if self._sending_since and self._loop.time() - self._sending_since > SEND_S:
            life.cancel()
        else:
            self._watch = self._loop.call_later(SEND_S / 4, self.watch, life)

    def unwatch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()

    async def stream(self, answer: Answer, delta: Delta) -> None:
        events = answer.events(delta)
        if self.status == 0:
            events = answer.opening() + events
            await self._start(200, EVENTS, [(b"cache-control", b"no-cache")])
        if not events:
            return
        self._sending_since = self._loop.time()
        try:
            await self._send({"type": "http.response.body", "body": events, "more_body": True})
        except OSError as exc:
            raise Cancelled("the client takes nothing of its answer") from exc
        self._sending_since = 0.0

    async def finish(self, last: bytes) -> None:
        await self._last(last)

    async def whole(self, body: bytes) -> None:
        length = [(b"content-length", str(len(body)).encode())]
        await self._start(200, JSON, length)
        await self._last(body)

    async def error(self, error: TriptychError) -> None:
        """As the response, or as the last event of a stream that has begun."""
        if isinstance(error, Cancelled):
            logger.info("request %s: %s", self._request_id, error)
        elif error.status >= 500:
            logger.warning("request %s: %s: %s", self._request_id, type(error).__name__, error)
        if self.status:
            await self._last(error_event(error_body(error)))
            return
        response = error_response(error)
        self.status = response.status_code
        headers = [(b"x-request-id", self._request_id.encode()), *response.raw_headers]
        await self._timed(
            {"type": "http.response.start", "status": self.status, "headers": headers}
        )
        await self._last(bytes(response.body))

    async def _start(self, status: int, kind: str, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        named = [(b"content-type", kind.encode()), (b"x-request-id", self._request_id.encode())]
        await self._timed(
            {"type": "http.response.start", "status": status, "headers": named + headers}
        )

    async def _last(self, body: bytes) -> None:
        await self._timed({"type": "http.response.body", "body": body, "more_body": False})

    async def _timed(self, message: dict[str, object]) -> None:
        try:
            async with asyncio.timeout(SEND_S):
                await self._send(message)
        except (TimeoutError, OSError) as exc:
            raise Cancelled("the client takes nothing of its answer") from exc


def error_response(error: TriptychError) -> Response:
    headers = {}
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


async def _read(body: BodyReader) -> ChatRequest:
    """What ``body`` asks for. Raises BadRequest as ``parse`` does."""
    text = body.text()
    try:
        chat = await offload(len(text) <= INLINE_NBYTES, parse, text)
        if body.files.keys() <= {item.url for item in chat.items()}:
            return chat
    except BadRequest as error:
        if body.prefix not in error.message:
            raise
    text = body.restored()
    return await offload(len(text) <= INLINE_NBYTES, parse, text)


def _timeout_s(scope: Scope, asked: float | None, longest: float) -> float:
    """The shortest of the header's, the body's and the server's own. Raises BadRequest."""
    given = Headers(scope=scope).get(TIMEOUT_HEADER)
    if given is None:
        return min(asked or longest, longest)
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise BadRequest(f"{TIMEOUT_HEADER} = {given[:80]!r} is not a time", param=TIMEOUT_HEADER)
    return min(seconds, asked or longest, longest)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _usage(life: asyncio.Task[Usage]) -> Usage:
    """What the ended pipeline returned. Raises what it raised, our own bugs as TriptychError."""
    if life.cancelled():
        raise Cancelled("the client has gone")
    error = life.exception()
    if error is None:
        return life.result()
    if not isinstance(error, TriptychError):
        logger.error("a request failed inside the router", exc_info=error)
        raise TriptychError("internal error") from error
    raise error
