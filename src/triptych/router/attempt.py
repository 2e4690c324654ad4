"""One try at answering a request: its id on the wire, its workers, what they hold for it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from triptych import wire
from triptych.errors import Overloaded, PeerUnproven, TransferFailed, TriptychError, WorkerLost
from triptych.router.call import Prompt
from triptych.router.client import WorkerClient
from triptych.router.inbox import Inboxes, StageFailed
from triptych.router.membership import Membership, Worker
from triptych.router.placement import (
    Candidate,
    Item,
    excess,
    place_decode,
    place_prompt,
    prefer,
    spread_items,
)

M = TypeVar("M", bound=wire.Message)
T = TypeVar("T")


@dataclass(frozen=True)
class _Charge:
    """Work that counts as outstanding at a worker."""

    worker: Worker
    amount: int
    item: int = -1
    """Which of the request's it is for, at an encoder."""


class Attempt:
    """Another try has another id, so that what the first one left under way cannot disturb it."""

    def __init__(
        self,
        wire_id: str,
        first: int,
        membership: Membership,
        client: WorkerClient,
        inboxes: Inboxes,
    ) -> None:
        """``first``: index of the token that it is to bring first."""
        self.wire_id = wire_id
        self.inbox = inboxes.open(wire_id, first)
        self.encoders: list[Worker] = []
        """The encoder of each image."""
        self.answering: dict[str, Worker] = {}
        """By role: who makes the answer."""
        self._membership = membership
        self._client = client
        self._inboxes = inboxes
        self._charges: list[_Charge] = []
        self._holders: set[Worker] = set()
        """Workers that may hold something for this attempt."""
        self._chosen: set[Worker] = set()

    # ------------------------------------------------------------------ placing

    def place_items(self, items: Sequence[Item], avoided: set[str], *, evenly: bool) -> None:
        """Choose ``encoders``; at least one encoder must be known. ``evenly``: as if they had
        nothing else to do, and had had none of the items."""
        known = self._allowed("encoder", avoided)
        candidates = [worker.candidate for worker in known.values()]
        if evenly:
            candidates = [Candidate(candidate.worker_id, load=0) for candidate in candidates]
        placed = spread_items(items, candidates)
        self.encoders = [known[worker_id] for worker_id in placed]
        for index, (worker, item) in enumerate(zip(self.encoders, items, strict=True)):
            self._choose(worker)
            self._charge(worker, item.patches, index)
            worker.recent.add([item.content])

    def found_cached(self, indices: Iterable[int]) -> None:
        """These items need no forward."""
        found = set(indices)
        self._discharge(lambda charge: charge.item in found)

    def place_prompt(
        self, roles: Iterable[str], prompt: Prompt, avoided: set[str], backlog: float = math.inf
    ) -> None:
        """Choose ``answering``; every role must have a worker. Counts what each will be busy
        with. Raises Overloaded if that is more than ``backlog`` times its KV cache."""
        n_prompt, n_all = prompt.n_tokens, prompt.n_tokens + prompt.n_left
        for role in roles:
            known = self._allowed(role, avoided, n_all)
            candidates = [worker.candidate for worker in known.values()]
            n_kept = n_prompt if role == "prefill" else n_all
            if role == "decode":
                worker = known[place_decode(candidates)]
            else:
                worker = known[place_prompt(n_prompt, n_kept, prompt.prefixes, candidates)]
                worker.recent.add(reversed(prompt.prefixes))  # the longest is the first to go
            self._check_backlog(worker, n_kept, backlog)
            self.answering[role] = worker
            self._choose(worker)
            self._charge(worker, n_kept)

    def _check_backlog(self, worker: Worker, n_kept: int, backlog: float) -> None:
        too_many = excess(n_kept, worker.candidate, backlog)
        if too_many > 0:
            raise Overloaded(
                f"{worker.load} tokens are outstanding at {worker.worker_id}, "
                f"whose KV cache holds {worker.capacity.kv_tokens}",
                retry_after_s=worker.pace.seconds_for(too_many, time.monotonic()),
            )

    def _allowed(self, role: str, avoided: set[str], n_tokens: int = 0) -> dict[str, Worker]:
        """Workers that did not fail the request and take so many tokens, if there are any."""
        workers = self._membership.workers(role)
        fitting = [w for w in workers if not 0 < w.capacity.max_model_len < n_tokens]
        known = {worker.worker_id: worker for worker in fitting or workers}
        return {worker_id: known[worker_id] for worker_id in prefer(list(known), avoided)}

    def _choose(self, worker: Worker) -> None:
        """Until the attempt is closed the worker may be sent something for it."""
        if worker not in self._chosen:
            self._chosen.add(worker)
            worker.users += 1

    def _charge(self, worker: Worker, amount: int, item: int = -1) -> None:
        worker.load += amount
        worker.pace.begin(time.monotonic())
        self._charges.append(_Charge(worker, amount, item))

    def discharge(self, *roles: str) -> None:
        """These roles have done their work for this attempt."""
        self._discharge(lambda charge: charge.worker.role in roles)

    def _discharge(self, done: Callable[[_Charge], bool]) -> None:
        now = time.monotonic()
        for charge in filter(done, self._charges):
            charge.worker.load -= charge.amount
            charge.worker.pace.done(charge.amount, now)
            if not charge.worker.load:
                charge.worker.pace.pause(now)
        self._charges = [charge for charge in self._charges if not done(charge)]

    # ------------------------------------------------------------------ talking to workers

    async def post(
        self,
        worker: Worker,
        path: str,
        message: wire.Message,
        answer: type[M],
        *,
        wait_s: float = 0,
    ) -> M:
        """As ``WorkerClient.post``; raises StageFailed, also for what another worker reported."""
        self._holders.add(worker)
        if worker.role != "encoder":
            # A lost encoder may have been read already; who reads from it says if not.
            worker.requests[self.wire_id] = self._lost(worker)
        try:
            reply = await self._client.post(worker, path, message, answer, wait_s=wait_s)
        except TriptychError as error:
            if not worker.channel.is_open:  # then it knows the session no more, and says so
                error = WorkerLost(f"{worker.worker_id} is lost: {error.message}")
            raise StageFailed(worker, error) from error
        self.inbox.check()
        return reply

    def _lost(self, worker: Worker) -> Any:
        return lambda error: self.inbox.fail(worker, error)

    def suspect(self, failure: StageFailed) -> Worker:
        """The worker to do without: who reports that bytes did not come is not who lost them."""
        error = failure.error
        if failure.reported and isinstance(error, WorkerLost | TransferFailed | PeerUnproven):
            if error.item is not None and 0 <= error.item < len(self.encoders):
                return self.encoders[error.item]
            if failure.worker.role == "decode":
                return self.answering["prefill"]
        return failure.worker

    def may_be_replaced(self, worker: Worker, avoided: set[str]) -> bool:
        """Is there, or may there soon be, another of its role: its channel has ended, and what
        comes back is a new process?"""
        others = self._membership.workers(worker.role)
        if any(other.worker_id not in avoided and other is not worker for other in others):
            return True
        return worker.draining or not worker.channel.is_open

    def close(self, *, cancel: Iterable[Worker] | None = None) -> None:
        """Forget the attempt. ``cancel``: who must drop what it holds; None: everybody."""
        self._inboxes.close(self.wire_id)
        for worker in self._holders if cancel is None else cancel:
            worker.channel.send(wire.Cancel(request_id=self.wire_id))
        for worker in self._holders:
            worker.requests.pop(self.wire_id, None)
        self.discharge("encoder", "prefill", "decode", "language")
        for worker in self._chosen:
            worker.users -= 1
            self._membership.settle(worker)
        self._chosen.clear()


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order. The first error ends the others and is raised as itself."""
    tasks: list[asyncio.Task[T]] = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(part) for part in work]
    except BaseExceptionGroup as errors:
        first: BaseException = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
    return [task.result() for task in tasks]
