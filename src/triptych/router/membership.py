"""Workers, known by the channel that each keeps to the router. Channel gone, worker gone."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from triptych import __version__, wire
from triptych.errors import WorkerLost
from triptych.observe import metrics
from triptych.refs import KVLayout, kv_mismatch
from triptych.router.admission import Pace
from triptych.router.placement import PREFIX_TOKENS, Candidate, Recent
from triptych.transfer.channel import Channel

logger = logging.getLogger(__name__)
ROLES = ("encoder", "prefill", "decode", "language")
DIGESTS = 10_000
"""Of images, that are remembered of an encoder."""


@dataclass(eq=False)
class Worker:
    """A worker while its channel is open."""

    worker_id: str
    role: str
    url: str
    capacity: wire.Capacity
    identity: wire.ModelIdentity
    kv: KVLayout | None
    transports: tuple[str, ...]
    channel: Channel
    recent: Recent
    """Digests of the images that an encoder was asked for, prefixes of the prompts of others."""
    load: int = 0
    """Outstanding patches of an encoder, outstanding tokens of any other role."""
    requests: dict[str, Callable[[WorkerLost], None]] = field(default_factory=dict)
    """By wire id: whom to tell when the worker is lost."""
    heard: bool = False
    """Something has come on its channel: it knows the session, and may be sent requests."""
    users: int = 0
    """Tries at requests that it was chosen for and that have not ended."""
    draining: bool = False
    """It is given nothing new."""
    drained: asyncio.Event = field(default_factory=asyncio.Event)
    """Nothing runs there any more, by its own word, or it is gone."""
    pace: Pace = field(default_factory=Pace)
    """Of its outstanding work."""
    waits: set[asyncio.Timeout] = field(default_factory=set)
    """Of those who wait for an answer to a request."""

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.worker_id, self.load, self.capacity.kv_tokens, self.recent)


class Membership:
    def __init__(self, identity: wire.ModelIdentity) -> None:
        """``identity``: what the router serves."""
        self._identity = identity
        self._workers: dict[str, Worker] = {}
        """By channel session."""
        self._changed = asyncio.Event()

    def check(self, hello: wire.Hello) -> str | None:
        """Why a worker is refused, both sides named; None when it is welcome.

        The router says which model is served, as far as it knows that without weights, the first
        worker the rest, and the first that hands KV over or takes it how that is laid out; the
        others must do the same.
        """
        if hello.role not in ROLES:
            return f"a router takes workers of role {', '.join(ROLES)}, not {hello.role!r}"
        if hello.release != __version__:
            return f"the worker is release {hello.release}, this router release {__version__}"
        if (reason := wire.mismatch(self._identity, hello.identity)) is not None:
            return f"{reason} (which this router serves)"
        for worker in self._workers.values():
            if worker.worker_id == hello.worker_id:
                continue  # it has dialled again
            reason = wire.mismatch(worker.identity, hello.identity) or kv_mismatch(
                worker.kv, worker.worker_id, hello.kv, hello.worker_id
            )
            if reason is not None:
                return f"{reason} ({worker.worker_id} is registered here)"
        return None

    def opened(self, channel: Channel) -> None:
        hello = channel.peer
        assert isinstance(hello, wire.Hello), "workers dial the router"
        for worker in list(self._workers.values()):
            if worker.worker_id == hello.worker_id:
                self.lost(worker.channel, "it has dialled again")
        self._workers[channel.session] = Worker(
            worker_id=hello.worker_id,
            role=hello.role,
            url=hello.url,
            capacity=hello.capacity,
            identity=hello.identity,
            kv=hello.kv,
            transports=hello.transports,
            channel=channel,
            recent=Recent(_remembered(hello.capacity)),
        )

    def lost(self, channel: Channel, reason: str) -> None:
        """The worker gets no new work; those that wait for it are told."""
        worker = self._workers.pop(channel.session, None)
        if worker is None:
            return
        logger.warning("%s at %s is lost: %s", worker.worker_id, worker.url, reason)
        self._note_change(worker.role)
        worker.drained.set()
        for wait in worker.waits:
            wait.reschedule(0.0)  # it has ended
        for tell in list(worker.requests.values()):
            tell(WorkerLost(f"{worker.worker_id} is lost: {reason}"))

    def hear(self, channel: Channel) -> Worker | None:
        """The worker that a message came from; its first one completes its joining."""
        worker = self._workers.get(channel.session)
        if worker is not None and not worker.heard:
            worker.heard = True
            logger.info("%s at %s has joined", worker.worker_id, worker.url)
            self._note_change(worker.role)
        return worker

    def workers(self, role: str) -> list[Worker]:
        """Those that may be given requests."""
        return [w for w in self.known() if w.role == role and not w.draining]

    def known(self) -> list[Worker]:
        """All that have joined, those that drain as well."""
        return [worker for worker in self._workers.values() if worker.heard]

    def present(self) -> Counter[str]:
        """Number of workers that may be given requests, by role; roles without one are absent."""
        return Counter(worker.role for worker in self.known() if not worker.draining)

    # ------------------------------------------------------------------ draining

    def drain(self, worker: Worker, *, done: bool) -> None:
        """It is given nothing new. ``done``: by its own word, nothing runs there any more."""
        if not worker.draining:
            logger.info("%s drains", worker.worker_id)
            worker.draining = True
            self._note_change(worker.role)
        if done:
            worker.drained.set()
        else:
            self.settle(worker)

    def settle(self, worker: Worker) -> None:
        """Tell a worker that drains when no request is with it any more."""
        if worker.draining and not worker.users:
            worker.channel.send(wire.Unneeded())

    # ------------------------------------------------------------------ waiting

    def longest(self, roles: Iterable[str]) -> int:
        """Tokens of the longest request that every role has a worker for; 0: none of them says."""
        longest = (max(w.capacity.max_model_len for w in self.workers(role)) for role in roles)
        return min((n for n in longest if n), default=0)

    async def wait_for(self, wanted: Callable[[], Sequence[str]], timeout_s: float) -> None:
        """Until every role that ``wanted`` names has a worker.

        ``wanted`` is asked again after every change. Raises WorkerLost naming the missing roles.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while self._missing(wanted()):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            names = " and ".join(self._missing(wanted()))
            raise WorkerLost(f"no {names} worker is registered with this router") from None

    def _missing(self, wanted: Sequence[str]) -> list[str]:
        present = self.present()
        return [role for role in wanted if role not in present]

    def _note_change(self, role: str) -> None:
        metrics.workers.labels(role).set(len(self.workers(role)))
        self._changed.set()


def _remembered(capacity: wire.Capacity) -> int:
    """How many of its images or prefixes to remember: of prefixes as many as its KV cache holds."""
    return capacity.kv_tokens // PREFIX_TOKENS or DIGESTS
