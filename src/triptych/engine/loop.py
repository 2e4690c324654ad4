"""The engine: one thread that owns the model, messages in, messages out."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.config import MIB, EngineConfig
from triptych.engine.backends import Compute, longest
from triptych.engine.block_manager import BlockManager
from triptych.engine.intake import Intake
from triptych.engine.messages import (
    AddRequest,
    Cancel,
    ItemLanded,
    Lapsed,
    Message,
    Prefilled,
    Progress,
    Proven,
    Reserve,
    Reserved,
    StartDecode,
    StepOutput,
    Used,
)
from triptych.engine.mirror import Followers
from triptych.engine.outbox import Outbox
from triptych.engine.sampler import Sampled
from triptych.engine.scheduler import Schedule, Scheduler, Work
from triptych.engine.sequence import Phase, Reservation, Rows, Sequence
from triptych.engine.withheld import Withheld
from triptych.errors import TriptychError, WorkerLost
from triptych.models.compiled import first_forwards
from triptych.models.language import LanguageModel
from triptych.models.stream import drain, failure, settle
from triptych.observe import metrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Result:
    """What one step brought one sequence."""

    work: Work
    sampled: Sampled | None
    started: float
    ended: float


class Engine:
    """Serves prompts and answers of many requests together.

    ``kv_memory``: (nbytes,) uint8 on the model's device, the KV cache; None: own memory of
    ``config.kv_mib``. ``emit`` is called on the engine thread, once a turn at most, and must not
    block. ``followers``: the other ranks of the group that this process leads. Raises ConfigError
    if the cache has no room for a block.
    """

    def __init__(
        self,
        model: LanguageModel,
        kv_memory: Tensor | None,
        config: EngineConfig,
        emit: Callable[[StepOutput], None],
        followers: Followers | None = None,
    ) -> None:
        if kv_memory is None:
            kv_memory = torch.zeros(config.kv_mib * MIB, dtype=torch.uint8, device=model.device)
        self.model = model
        max_tokens = longest(model, config)
        named_blocks = config.block_size if config.prefix_cache else 0
        self._intake = Intake(model, max_tokens, named_blocks)
        self._compute = Compute(model, kv_memory, config, max_tokens, followers)
        self.kv, self._runner = self._compute.kv, self._compute.runner
        blocks = BlockManager(self._compute.n_blocks, config.block_size)
        self.max_model_len = min(max_tokens, blocks.n_blocks * config.block_size)
        """Longest prompt plus answer."""
        self._threads = config.threads
        self._emit = emit
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._scheduler = Scheduler(
            blocks,
            config.step_tokens(model.device.type),
            config.max_sequences,
            config.overlap,
            longest_run=max(1, model.longest_run),
        )
        self._warm: Future[None] = Future()
        self._sequences: dict[str, Sequence] = {}
        self._reservations: dict[str, Reservation] = {}
        self._withheld: Withheld[_Result] = Withheld()
        self._out = Outbox()
        self.usage = self._scheduler.usage()
        """After the last turn; replaced as a whole, so that any thread may read it."""
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    # -------------------------------------------------------------- any thread

    def submit(self, message: Message) -> None:
        """Hand in a message. Raises WorkerLost for new work after ``close``."""
        if self._closed and isinstance(message, AddRequest | Reserve):
            raise WorkerLost("the engine is closed")
        self._inbox.put(message)

    def start(self) -> Future[None]:
        """Done when the first request will be as fast as any; or with what went wrong."""
        self._thread.start()
        return self._warm

    def close(self, timeout_s: float) -> None:
        """Fail what is left and end the thread once the running step is over. Idempotent."""
        self._closed = True
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("the engine's running step did not end within %g s", timeout_s)

    # -------------------------------------------------------------- engine thread

    def _loop(self) -> None:
        if not self._warm_up():
            return
        busy = False
        while self._take_messages(wait=not busy):
            schedule = self._scheduler.schedule()
            self._rearrange(schedule)
            self._grant(schedule.granted)
            if schedule.work:
                self._step(schedule.work)
            busy = bool(schedule.work)
            self.usage = self._scheduler.usage()
            self._flush()
        for request_id in [*self._sequences, *self._reservations]:
            self._fail(request_id, WorkerLost("the engine was closed"))
        self._flush()

    def _warm_up(self) -> bool:
        # Here and not in the main thread: compiled code is valid for the settings of its thread.
        settle(self.model.device, self._threads)
        try:
            with first_forwards:
                self._compute.warm_up()
                self._compute.capture()
        except Exception as exc:  # engine thread's boundary: whoever starts it is told
            logger.exception("warming up failed")
            self._warm.set_exception(exc)
            return False
        self._warm.set_result(None)
        return True

    def _take_messages(self, *, wait: bool) -> bool:
        """Apply everything in the inbox, after waiting for a first message if told to.

        False when the engine is to end. An idle engine waits without an end: ``close`` wakes it.
        """
        while wait or not self._inbox.empty():
            message = self._inbox.get()
            if message is None:
                return False
            with self._ending_on_failure((message.request_id,)):
                self._apply(message)
            wait = False
        return True

    def _apply(self, message: Message) -> None:
        match message:
            case AddRequest():
                self._add(message)
            case ItemLanded():
                self._land(message)
            case Proven():
                for result in self._withheld.prove(message.request_id, message.serial):
                    self._publish(result)
            case Lapsed():
                self._roll_back(message)
            case Reserve():
                self._reserve(message)
            case StartDecode():
                self._start_decode(message)
            case Cancel():
                self._end(message.request_id)

    def _rearrange(self, schedule: Schedule) -> None:
        for sequence in schedule.preempted:
            # What was withheld goes too: it will be computed again.
            self._withheld.forget(sequence.request_id)
            self._runner.preempt(sequence.request_id, sequence.output)
            metrics.preemptions.inc()
            now = time.time()
            self._out.span(sequence.request_id, "preempted", now, now)
        rows = schedule.rows
        for sequence, item in rows.returned:
            self._give_back(sequence.request_id, item)
        self._out.withdrawn += [sequence.request_id for sequence in rows.withdrawn]
        self._out.wanted += [(sequence.request_id, item) for sequence, item in rows.wanted]
        self._out.needless += [(sequence.request_id, item) for sequence, item in rows.needless]
        for sequence in schedule.begun:
            metrics.prefix_tokens.labels("found").inc(sequence.computed)
            metrics.prefix_tokens.labels("computed").inc(sequence.n_prompt - sequence.computed)
            if sequence.keep_kv and sequence.computed:
                self._lend(sequence, sequence.computed)

    def _step(self, work: Seq[Work]) -> None:
        started = time.time()
        for sequence in (w.sequence for w in work):
            if sequence.scheduled is None:
                sequence.scheduled = started
                self._out.span(sequence.request_id, "queue", sequence.arrived, started)
        with self._ending_on_failure([w.sequence.request_id for w in work]):
            sampled = iter(self._runner.run(work))
            ended = time.time()
            for w in work:
                w.sequence.computed = w.stop
                self._finish(_Result(w, next(sampled) if w.samples else None, started, ended))

    def _grant(self, granted: Iterable[Reservation]) -> None:
        now = time.time()
        for reservation in granted:
            self._out.reserved.append(Reserved(reservation.request_id, reservation.blocks))
            self._out.span(reservation.request_id, "queue", reservation.arrived, now)

    def _flush(self) -> None:
        output = self._out.seal()
        if output is not None:
            self._out = Outbox()
            self._emit(output)

    # -------------------------------------------------------------- messages

    def _add(self, message: AddRequest) -> None:
        if self._knows(message.request_id):
            return
        sequence, prompt = self._intake.prompt(message)
        self._scheduler.add(sequence)
        self._sequences[message.request_id] = sequence
        self._runner.add(message.request_id, prompt)

    def _land(self, message: ItemLanded) -> None:
        sequence = self._sequences.get(message.request_id)
        if sequence is None or not 0 <= message.item < len(sequence.items):
            self._out.consumed.append((message.request_id, message.item))
            return
        item = sequence.items[message.item]
        assert item.where is not Rows.LANDED, "an image lands once"
        if item.where is Rows.USED or (item.where is Rows.RETURNED and not message.borrowed):
            self._out.consumed.append((message.request_id, message.item))
            return
        item.where, item.borrowed = Rows.LANDED, message.borrowed
        self._runner.land(message.request_id, message.item, message.rows)

    def _roll_back(self, message: Lapsed) -> None:
        sequence = self._sequences.get(message.request_id)
        if sequence is None:
            return
        item = sequence.items[message.item]
        if item.where is Rows.LANDED:
            item.where = Rows.ASKED
        self._runner.drop_rows(message.request_id, message.item)
        dropped = self._withheld.roll_back(message.request_id, message.item)
        if dropped is not None:
            sequence.computed = dropped.work.start

    def _reserve(self, message: Reserve) -> None:
        if self._knows(message.request_id):
            return
        reservation = self._intake.reservation(message)
        self._scheduler.add(reservation)
        self._reservations[message.request_id] = reservation

    def _start_decode(self, message: StartDecode) -> None:
        reservation = self._reservations.get(message.request_id)
        if reservation is None:
            return
        if message.first.finish:
            self._end(message.request_id)
            return
        sequence = self._intake.answer(message, reservation)
        del self._reservations[message.request_id]
        self._sequences[message.request_id] = sequence
        self._scheduler.start(sequence)

    def _knows(self, request_id: str) -> bool:
        known = request_id in self._sequences or request_id in self._reservations
        if known:
            logger.warning("request %s was sent twice; the second is ignored", request_id)
        return known

    # -------------------------------------------------------------- results of a step

    def _finish(self, result: _Result) -> None:
        """Publish the result, or keep it until the rows it follows from are proven right."""
        work, request_id = result.work, result.work.sequence.request_id
        items = () if work.is_decode else work.sequence.borrowed_between(work.start, work.stop)
        if items or self._withheld.waits(request_id):
            serial = self._withheld.hold(request_id, result, items)
            if items:
                self._out.used.append(Used(request_id, serial, items))
        else:
            self._publish(result)

    def _publish(self, result: _Result) -> None:
        self._scheduler.confirm(result.work.sequence, result.work.stop)
        if not result.work.is_decode:
            self._advance_prompt(result.work, result.started, result.ended)
        if result.sampled is not None:
            self._accept(result.work, result.sampled, result.started, result.ended)

    def _advance_prompt(self, work: Work, started: float, ended: float) -> None:
        sequence, stop = work.sequence, work.stop
        self._out.span(
            sequence.request_id, "prefill", started, ended, f"tokens {work.start}..{stop}"
        )
        for index, item in enumerate(sequence.items):
            if item.stop <= stop and item.where is Rows.LANDED:
                item.where = Rows.USED
                self._give_back(sequence.request_id, index)
        if sequence.keep_kv:
            self._lend(sequence, stop)

    def _lend(self, sequence: Sequence, computed: int) -> None:
        """A consumer may read its full blocks; of a whole prompt the last one as well."""
        whole = computed == sequence.n_prompt
        n_blocks = len(sequence.blocks) if whole else computed // self.kv.block_size
        self._out.progress.append(
            Progress(sequence.request_id, computed, sequence.blocks[:n_blocks])
        )

    def _accept(self, work: Work, sampled: Sampled, started: float, ended: float) -> None:
        sequence, request_id = work.sequence, work.sequence.request_id
        finish = sequence.accept(sampled.token)
        event = self._out.token(sequence, sampled, finish)
        if work.is_decode:
            sequence.decoded += 1
            if sequence.decoding_since is None:
                sequence.decoding_since = started
        else:
            self._out.span(request_id, "first_token", ended, ended)
        if sequence.keep_kv:
            self._out.prefilled.append(Prefilled(request_id, event, sequence.next_position))
            self._scheduler.keep(sequence)
            self._runner.forget(request_id)
        elif finish:
            if sequence.decoding_since is not None:
                note = str(sequence.decoded)
                self._out.span(request_id, "decode", sequence.decoding_since, ended, note)
            self._end(request_id)
        elif sequence.phase is Phase.PREFILL:
            sequence.become(Phase.DECODE)

    # -------------------------------------------------------------- ends

    def _give_back(self, request_id: str, item: int) -> None:
        self._runner.drop_rows(request_id, item)
        self._out.consumed.append((request_id, item))

    def _end(self, request_id: str) -> None:
        """Forget the request and free what it holds. Idempotent."""
        self._reservations.pop(request_id, None)
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            for index, item in enumerate(sequence.items):
                if item.where is Rows.LANDED:
                    self._give_back(request_id, index)
            sequence.become(Phase.ENDED)
        self._withheld.forget(request_id)
        self._scheduler.end(request_id)
        self._runner.forget(request_id)

    def _fail(self, request_id: str, error: TriptychError) -> None:
        self._end(request_id)
        self._out.failed.append((request_id, error))

    @contextmanager
    def _ending_on_failure(self, request_ids: Iterable[str]) -> Iterator[None]:
        """The boundary between requests: what goes wrong inside ends these and nothing else."""
        try:
            yield
        except TriptychError as exc:
            drain(self.model.device)  # before their memory is given away
            for request_id in request_ids:
                self._fail(request_id, exc)
        except Exception as exc:  # a task boundary: the model may raise anything
            logger.exception("requests %s failed", ", ".join(request_ids))
            error = failure(self.model.device, f"{type(exc).__name__}: {exc}")
            for request_id in request_ids:
                self._fail(request_id, error)
