"""The engine: one thread that owns the model, messages in, messages out."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import torch
from torch import Tensor

from triptych.config import MIB, EngineConfig
from triptych.engine.ahead import follow, goes_on
from triptych.engine.backends import Compute, longest
from triptych.engine.block_manager import BlockManager
from triptych.engine.intake import Intake
from triptych.engine.messages import AddRequest, Message, Reserve, StepOutput
from triptych.engine.mirror import Followers
from triptych.engine.outbox import Result
from triptych.engine.requests import Requests
from triptych.engine.runner import Launched
from triptych.engine.scheduler import Scheduler
from triptych.engine.sequence import Phase
from triptych.engine.work import Schedule, Work
from triptych.errors import TriptychError, WorkerLost
from triptych.models.compiled import first_forwards
from triptych.models.language import LanguageModel
from triptych.models.stream import drain, failure, settle_thread

logger = logging.getLogger(__name__)


class Engine:
    """Serves prompts and answers of many requests together.

    ``kv_memory``: (nbytes,) uint8 on the model's device, the KV cache; None: own memory of
    ``config.kv_mib``. ``emit`` is called on the engine thread, twice a turn at most, and must not
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
        intake = Intake(model, max_tokens, named_blocks)
        self._requests = Requests(intake, self._scheduler, self._runner, config.block_size)
        self._launched: Launched | None = None
        """A step that computes while messages are taken: it was launched ahead."""
        self._ends = False
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
            busy = self._turn()
        if self._launched is not None:
            self._finish(self._launched)  # it writes to memory that others will have
        self._requests.fail_all(WorkerLost("the engine was closed"))
        self._flush()
        self._runner.let_go()

    def _turn(self) -> bool:
        """The results of a step, while the one behind it computes if that can be launched already.
        False: there was nothing to compute."""
        work: tuple[Work, ...] = ()
        if self._launched is None:
            schedule = self._scheduler.schedule()
            self._requests.rearrange(schedule)
            self._flush()  # who brings images need not wait for the step
            work = schedule.work
        step, self._launched = self._launched or self._launch(work), None
        if step is not None:
            behind = self._behind(step) if self._compute.runs_ahead else None
            if behind is not None:
                self._requests.rearrange(behind)
                self._launched = self._launch(behind.work, step)
            self._requests.foresee(step.work)
            self._finish(step)
        self.usage = self._scheduler.usage()
        self._flush()
        return step is not None or bool(work)

    def _behind(self, step: Launched) -> Schedule | None:
        """What can be computed next before the step has been read."""
        if step.nearly is not None and goes_on(step.work):
            with self._ending_on_failure(_going(step)):
                step.nearly.wait()
            if not self._take_messages(wait=False):  # whoever has come by now goes first
                return None
        return follow(step.work, self._scheduler)

    def _warm_up(self) -> bool:
        # Here and not in the main thread: compiled code is valid for the settings of its thread.
        settle_thread(self.model.device, self._threads)
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
        while not self._ends and (wait or not self._inbox.empty()):
            message = self._inbox.get()
            if message is None:
                self._ends = True
                break
            with self._ending_on_failure((message.request_id,)):
                self._requests.apply(message)
            wait = False
        return not self._ends

    def _launch(self, work: tuple[Work, ...], after: Launched | None = None) -> Launched | None:
        """None if there is no work, or it failed. ``after``: as for ``Runner.launch``."""
        launched = None
        if work:
            self._requests.begin(work)
            with self._ending_on_failure([w.sequence.request_id for w in work]):
                launched = self._runner.launch(work, after)
        return launched

    def _finish(self, step: Launched) -> None:
        """Wait for the step, and hand on what it brought those that have not ended since."""
        with self._ending_on_failure(_going(step)):
            sampled = iter(self._runner.read(step))
            ended = time.time()
            for w in step.work:
                result = Result(w, next(sampled) if w.samples else None, step.started, ended)
                if w.sequence.phase is not Phase.ENDED:
                    self._requests.take(result)

    def _flush(self) -> None:
        output = self._requests.seal()
        if output is not None:
            self._emit(output)

    @contextmanager
    def _ending_on_failure(self, request_ids: Iterable[str]) -> Iterator[None]:
        """The boundary between requests: what goes wrong inside ends these and nothing else."""
        try:
            yield
        except TriptychError as exc:
            drain(self.model.device)  # before their memory is given away
            for request_id in request_ids:
                self._requests.fail(request_id, exc)
        except Exception as exc:  # a task boundary: the model may raise anything
            logger.exception("requests %s failed", ", ".join(request_ids))
            error = failure(self.model.device, f"{type(exc).__name__}: {exc}")
            for request_id in request_ids:
                self._requests.fail(request_id, error)


def _going(step: Launched) -> list[str]:
    """Ids of those in it that have not ended since it was launched."""
    return [w.sequence.request_id for w in step.work if w.sequence.phase is not Phase.ENDED]
