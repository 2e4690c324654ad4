"""What becomes of each request inside an engine: messages and steps' results in, an output out."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from triptych.engine.intake import Intake
from triptych.engine.messages import (
    AddRequest,
    Cancel,
    Cramped,
    ItemLanded,
    Lapsed,
    Message,
    Prefilled,
    Proven,
    Reserve,
    Reserved,
    StartDecode,
    StepOutput,
    Used,
    Vouched,
)
from triptych.engine.outbox import Outbox, Result
from triptych.engine.runner import Runner
from triptych.engine.sampler import Sampled
from triptych.engine.scheduler import Scheduler
from triptych.engine.sequence import Phase, Reservation, Rows, Sequence
from triptych.engine.withheld import Withheld
from triptych.engine.work import Schedule, Work
from triptych.errors import TriptychError
from triptych.observe import metrics

logger = logging.getLogger(__name__)


class Requests:
    """Tells ``scheduler`` and ``runner`` what follows. On the engine thread alone."""

    def __init__(
        self, intake: Intake, scheduler: Scheduler, runner: Runner, block_size: int
    ) -> None:
        self.sequences: dict[str, Sequence] = {}
        self.reservations: dict[str, Reservation] = {}
        self.withheld: Withheld[Result] = Withheld()
        self._intake = intake
        self._scheduler = scheduler
        self._runner = runner
        self._block_size = block_size
        self._out = Outbox()

    def seal(self) -> StepOutput | None:
        """All that there is to say since this was last called."""
        output = self._out.seal()
        if output is not None:
            self._out = Outbox()
        return output

    def apply(self, message: Message) -> None:
        """Raises TriptychError if what it asks for cannot be done."""
        match message:
            case AddRequest():
                self._add(message)
            case ItemLanded():
                self._land(message)
            case Proven():
                for result in self.withheld.prove(message.request_id, message.serial):
                    self._publish(result)
            case Lapsed():
                self._roll_back(message)
            case Vouched():
                if (sequence := self.sequences.get(message.request_id)) is not None:
                    sequence.vouch(message.item)
            case Cramped():
                self._scheduler.cramped(message.request_id)
            case Reserve():
                self._reserve(message)
            case StartDecode():
                self._start_decode(message)
            case Cancel():
                self._end(message.request_id)

    def rearrange(self, schedule: Schedule) -> None:
        """Carry out all of it but the work."""
        now = time.time()
        for sequence in schedule.preempted:
            # What was withheld goes too: it will be computed again.
            self.withheld.forget(sequence.request_id)
            self._runner.preempt(sequence.request_id, sequence.output)
            metrics.preemptions.inc()
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
                self._out.lend(sequence, sequence.computed, self._block_size)
        for reservation in schedule.granted:
            self._out.reserved.append(Reserved(reservation.request_id, reservation.blocks))
            self._out.span(reservation.request_id, "queue", reservation.arrived, now)

    # -------------------------------------------------------------- messages

    def _add(self, message: AddRequest) -> None:
        if self._knows(message.request_id):
            return
        sequence, prompt = self._intake.prompt(message)
        self._scheduler.add(sequence)
        self.sequences[message.request_id] = sequence
        self._runner.add(message.request_id, prompt)

    def _land(self, message: ItemLanded) -> None:
        sequence = self.sequences.get(message.request_id)
        if sequence is None or not sequence.land(message.item, message.trust):
            self._out.consumed.append((message.request_id, message.item))
        else:
            self._runner.land(message.request_id, message.item, message.rows)

    def _roll_back(self, message: Lapsed) -> None:
        sequence = self.sequences.get(message.request_id)
        if sequence is None:
            return
        item = sequence.items[message.item]
        if item.where is Rows.LANDED:
            item.where = Rows.ASKED
        self._runner.drop_rows(message.request_id, message.item)
        dropped = self.withheld.roll_back(message.request_id, message.item)
        if dropped is not None:
            sequence.computed = dropped.work.start

    def _reserve(self, message: Reserve) -> None:
        if self._knows(message.request_id):
            return
        reservation = self._intake.reservation(message)
        self._scheduler.add(reservation)
        self.reservations[message.request_id] = reservation

    def _start_decode(self, message: StartDecode) -> None:
        reservation = self.reservations.get(message.request_id)
        if reservation is None:
            return
        if message.first.finish:
            self._end(message.request_id)
            return
        sequence = self._intake.answer(message, reservation)
        del self.reservations[message.request_id]
        self.sequences[message.request_id] = sequence
        self._scheduler.start(sequence)

    def _knows(self, request_id: str) -> bool:
        known = request_id in self.sequences or request_id in self.reservations
        if known:
            logger.warning("request %s was sent twice; the second is ignored", request_id)
        return known

    # -------------------------------------------------------------- steps

    def begin(self, work: Iterable[Work]) -> None:
        """These are about to be computed."""
        now = time.time()
        for sequence in (w.sequence for w in work):
            if sequence.scheduled is None:
                sequence.scheduled = now
                self._out.span(sequence.request_id, "queue", sequence.arrived, now)

    def foresee(self, work: Iterable[Work]) -> None:
        """While it is computed: name the blocks that it will have filled."""
        for w in work:
            if w.sequence.names is not None and not w.is_decode:
                w.sequence.names.first(w.stop)

    def take(self, result: Result) -> None:
        """Publish the result, or keep it until the rows it follows from are proven right."""
        work, request_id = result.work, result.work.sequence.request_id
        work.sequence.computed = work.stop
        items = () if work.is_decode else work.sequence.doubtful_between(work.start, work.stop)
        if items or self.withheld.waits(request_id):
            serial = self.withheld.hold(request_id, result, items)
            if items:
                self._out.used.append(Used(request_id, serial, items))
        else:
            self._publish(result)

    def _publish(self, result: Result) -> None:
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
            self._out.lend(sequence, stop, self._block_size)

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
        self.reservations.pop(request_id, None)
        sequence = self.sequences.pop(request_id, None)
        if sequence is not None:
            for index, item in enumerate(sequence.items):
                if item.where is Rows.LANDED:
                    self._give_back(request_id, index)
            sequence.become(Phase.ENDED)
        self.withheld.forget(request_id)
        self._scheduler.end(request_id)
        self._runner.forget(request_id)

    def fail(self, request_id: str, error: TriptychError) -> None:
        self._end(request_id)
        self._out.failed.append((request_id, error))

    def fail_all(self, error: TriptychError) -> None:
        for request_id in [*self.sequences, *self.reservations]:
            self.fail(request_id, error)
