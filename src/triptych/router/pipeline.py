"""The life of a request, in one coroutine: ``Pipeline.run``."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence

from triptych import wire
from triptych.config import RouterConfig
from triptych.errors import (
    DeadlineExceeded,
    NoRoom,
    PromptTooLong,
    SlotGone,
    TriptychError,
    UnsupportedModel,
)
from triptych.observe import metrics
from triptych.router.answers import Delta, Usage
from triptych.router.attempt import Attempt
from triptych.router.call import Call, File, Prompt
from triptych.router.choices import Emit, answer_all
from triptych.router.client import WorkerClient
from triptych.router.detokenize import Detokenizer
from triptych.router.encoding import Encoding
from triptych.router.files import Files
from triptych.router.inbox import Inboxes, StageFailed
from triptych.router.membership import Membership, Worker
from triptych.router.offload import INLINE_CHARACTERS, offload
from triptych.router.openai import DEFAULT_MAX_TOKENS, ChatRequest
from triptych.router.placement import answering_roles
from triptych.router.prefixes import prefixes
from triptych.router.prompt import Prompter
from triptych.router.timelines import Timelines

RETRIES = 2
"""More tries that a request gets on other workers; the count begins anew with every token."""
LOSSES = 6
"""More tries in all, those included, while its workers die or vanish: that is seldom the doing of
the request, but it might be."""
ENCODINGS = 8
"""More tries that it gets because embeddings were let go that had to be read again, likewise."""


class Pipeline:
    def __init__(
        self,
        config: RouterConfig,
        prompter: Prompter,
        membership: Membership,
        inboxes: Inboxes,
        timelines: Timelines,
    ) -> None:
        self._config = config
        self._timeouts = config.timeouts
        self._prompter = prompter
        self._membership = membership
        self._inboxes = inboxes
        self._timelines = timelines
        self._client = WorkerClient(config.timeouts)
        self._files = Files(config, timelines)
        self._encoding = Encoding(config, membership, self._files, timelines)

    async def close(self) -> None:
        await self._client.close()

    async def run(self, call: Call, emit: Emit) -> Usage:
        """The life of a request: from its arrival until ``emit`` has had its last text.

        A worker that is lost costs another try, after the first token too: the next workers go on
        behind the tokens that the client has had.

        Raises what it ends with otherwise. However it ends, cancelled from outside too, no
        worker is left holding anything for it.
        """
        try:
            async with asyncio.timeout(call.timeout_s):
                rendered = self._prompter.render(call.chat)
                call.arrange(self._prompter.order(rendered))
                files = await self._files.fetch(call)

                async def answer(call: Call, files: list[File], emit: Emit) -> Usage:
                    return await self._answer(call, rendered, files, emit)

                return await answer_all(call, files, answer, emit)
        except TimeoutError:
            raise DeadlineExceeded(f"not finished in {call.timeout_s:g} s") from None
        except TriptychError as error:
            raise call.located(error) from error

    async def _answer(self, call: Call, rendered: str, files: list[File], emit: Emit) -> Usage:
        """One answer, with as many tries as it takes. Raises what it ends with otherwise."""
        prompter = self._prompter
        text = Detokenizer(prompter.decode, call.chat.stops, additive=prompter.additive)
        while True:
            attempt = self._next_attempt(call)
            cancel: Sequence[Worker] | None = None
            try:
                items = await self._encoding.encode(call, attempt, files)
                prompt = await self._expand(call, attempt, rendered, items)
                await self._start(call, attempt, prompt, items)
                usage, cancel = await self._relay(call, attempt, prompt, files, text, emit)
                return usage
            except StageFailed as failure:
                self._retry_or_raise(call, attempt, failure)
            finally:
                attempt.close(cancel=cancel)

    def _next_attempt(self, call: Call) -> Attempt:
        wire_id = call.next_wire_id()
        self._timelines.share(call.request_id, wire_id)
        first = len(call.tokens)
        return Attempt(wire_id, first, self._membership, self._client, self._inboxes)

    # ------------------------------------------------------------------ the prompt

    async def _expand(
        self, call: Call, attempt: Attempt, rendered: str, items: Sequence[wire.PrefillItem]
    ) -> Prompt:
        start = time.time()
        token_ids = await self._prompter.tokens(rendered, [item.meta.text for item in items])
        rows = sum(item.meta.rows for item in items)
        places = self._prompter.count_rows(token_ids)
        if rows != places:
            raise UnsupportedModel(f"{rows} embedding rows, {places} tokens for them in the prompt")
        topology = self._config.topology

        def roles() -> tuple[str, ...]:
            return answering_roles(topology, self._membership.present())

        await self._membership.wait_for(roles, self._timeouts.worker)
        if call.sampling is None:
            limit = self._membership.longest(roles())
            max_tokens = self._max_tokens(call.chat, len(token_ids), limit)
            call.sampling = call.first_sampling(max_tokens, self._prompter.stop_ids)
        begins = await offload(
            len(token_ids) <= INLINE_CHARACTERS,
            prefixes,
            token_ids,
            [item.meta for item in items],
            self._prompter.row_token_ids,
        )
        prompt = Prompt(tuple(token_ids), call.sampling, tuple(call.tokens), tuple(begins))
        backlog = math.inf if call.placed else self._config.max_backlog
        attempt.place_prompt(roles(), prompt, call.avoided, backlog)
        call.placed = True
        self._timelines.own(call.request_id, "tokenize", start, note=f"{len(token_ids)} tokens")
        return prompt

    def _max_tokens(self, chat: ChatRequest, n_prompt: int, limit: int) -> int:
        """As asked for; else what fits, ``DEFAULT_MAX_TOKENS`` at most. Raises PromptTooLong."""
        asked = chat.max_new_tokens
        if not limit:
            return asked or DEFAULT_MAX_TOKENS
        if n_prompt + (asked or 1) > limit:
            answer = f" and max_tokens {asked}" if asked else ""
            raise PromptTooLong(
                f"the model takes {limit} tokens; the prompt has {n_prompt}{answer}",
                param="messages",
            )
        return asked or min(DEFAULT_MAX_TOKENS, limit - n_prompt)

    # ------------------------------------------------------------------ the answer

    async def _start(
        self, call: Call, attempt: Attempt, prompt: Prompt, items: Sequence[wire.PrefillItem]
    ) -> None:
        """Set the answering workers going; tokens come to the attempt's inbox."""
        work = wire.PrefillRequest(
            request_id=attempt.wire_id,
            token_ids=prompt.token_ids,
            items=tuple(items),
            sampling=prompt.sampling,
            resumed=prompt.resumed,
        )
        if language := attempt.answering.get("language"):
            await attempt.post(language, "/generate", work, wire.Accepted)
            return
        prefill, decode = attempt.answering["prefill"], attempt.answering["decode"]
        decodes = prompt.n_left > 1
        if decodes:
            start = time.time()
            n_tokens = len(prompt.token_ids) + prompt.sampling.max_tokens
            room = wire.ReserveRequest(request_id=attempt.wire_id, n_tokens=n_tokens)
            wait_s = self._timeouts.pool
            await attempt.post(decode, "/reserve", room, wire.ReserveResponse, wait_s=wait_s)
            self._timelines.own(call.request_id, "reserve", start, note=f"{n_tokens} tokens")
        reply = await attempt.post(prefill, "/prefill", work, wire.PrefillResponse)
        if not decodes:
            return
        if reply.kv is None:
            raise TriptychError(f"{prefill.worker_id} lends no KV")
        go_on = wire.DecodeRequest(
            request_id=attempt.wire_id,
            kv=reply.kv,
            sampling=prompt.sampling,
            resumed=prompt.resumed,
        )
        await attempt.post(decode, "/decode", go_on, wire.Accepted)

    async def _relay(
        self,
        call: Call,
        attempt: Attempt,
        prompt: Prompt,
        files: list[File],
        text: Detokenizer,
        emit: Emit,
    ) -> tuple[Usage, Sequence[Worker] | None]:
        """Tokens to text until the answer ends. (Usage, who must still be told: None is all.)"""
        first_token = 0.0
        while True:
            events = await attempt.inbox.take()
            call.failures = call.let_go = 0
            if not first_token:
                first_token = time.time()
                attempt.discharge("encoder", "prefill")
                for file in files:
                    file.data = None  # seldom asked for again, and then fetched again
            if not call.tokens and not call.choice:
                metrics.first_token_seconds.observe(first_token - call.arrived)
            new, used, finish = "", 0, ""
            for event in events:
                call.tokens.append(event.token)
                finish = event.finish
                if finish != "stop":  # an end token is no text
                    used += 1
                    new += text.push(event.token)
                if finish:
                    new += text.finish()
                if text.stopped:
                    finish = "stop"
                if finish:
                    break
            await emit(Delta(new, tuple(events[:used]), finish, call.choice))
            if finish:
                n_prompt, n_answer = len(prompt.token_ids), len(call.tokens)
                self._timelines.own(
                    call.request_id, "stream", first_token, note=f"{n_answer} tokens"
                )
                usage = Usage(n_prompt, n_answer, n_prompt + n_answer)
                return usage, _still_holding(attempt, prompt, ended=bool(event.finish))

    # ------------------------------------------------------------------ failures

    def _retry_or_raise(self, call: Call, attempt: Attempt, failure: StageFailed) -> None:
        """Returns if the request may be tried on other workers, else raises the error."""
        if isinstance(failure.error, NoRoom) and not call.patient:
            call.patient = True
            return
        if (
            isinstance(failure.error, PromptTooLong)
            and failure.worker.role == "encoder"
            and not call.evenly
            and attempt.may_be_replaced(failure.worker, set())
        ):
            call.evenly = True
            return
        if isinstance(failure.error, SlotGone) and failure.error.item is not None:
            # Its encoder may have it again, and is not to blame: it needed the room.
            call.let_go += 1
            if call.let_go > ENCODINGS:
                raise failure.error
            self._note_retry(call, "encoder", failure)
            return
        worker = attempt.suspect(failure)
        call.avoided.add(worker.worker_id)
        call.failures += 1
        if (
            not failure.error.retryable
            or call.failures > (RETRIES if worker.channel.is_open else LOSSES)
            or not attempt.may_be_replaced(worker, call.avoided)
        ):
            raise failure.error
        self._note_retry(call, worker.role, failure)

    def _note_retry(self, call: Call, role: str, failure: StageFailed) -> None:
        metrics.retries.labels(role).inc()
        note = f"{type(failure.error).__name__}: {failure.error.message}"
        self._timelines.own(
            call.request_id, "retry", time.time(), note=f"after {len(call.tokens)} tokens: {note}"
        )


def _still_holding(attempt: Attempt, prompt: Prompt, *, ended: bool) -> Sequence[Worker] | None:
    """Who holds something after the last token. ``ended``: the workers ended the answer."""
    if not ended:
        return None
    if prompt.n_left == 1 and "prefill" in attempt.answering:
        return [attempt.answering["prefill"]]  # its KV was lent to nobody
    return ()
