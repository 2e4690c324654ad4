"""One claim of a consumer: what the producer said of it, and how far it is.

``Loan`` is the claim of an embedding that is used where its producer has it, ``Copy`` of one that
was read into this process's memory.
"""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from triptych import wire
from triptych.errors import DeadlineExceeded, TransferFailed, TriptychError, rebuild
from triptych.refs import AnyRef, EmbeddingRef
from triptych.states import PULL, PullEvent, PullState, advance


@dataclass
class Pull:
    """One claim, as the producer's messages move it. Sequential: one read at a time."""

    claim: int
    ref: AnyRef
    state: PullState = PullState.CLAIMED
    ready: deque[wire.Ready] = field(default_factory=deque)
    """Not read yet."""
    valid: deque[wire.Valid] = field(default_factory=deque)
    n_valid: int = 0
    """How many such answers have come: questions are answered in the order they were asked."""
    error: TriptychError | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    count: int = 0
    """Pieces landed."""
    nbytes: int = 0
    read_s: float = 0.0

    def take(self, message: wire.ChannelMessage) -> None:
        match message:
            case wire.Ready():
                self.ready.append(message)
            case wire.Valid():
                self.valid.append(message)
                self.n_valid += 1
            case wire.Denied():
                item = None if message.item < 0 else message.item
                self.error = rebuild(message.error, message.reason, item=item)
            case wire.Expired():
                self.error = TransferFailed("the lease expired")
        self.changed.set()

    def step(self, event: PullEvent) -> None:
        self.state = advance(PULL, self.state, event)

    async def until(self, condition: Callable[[], bool], deadline: float, what: str) -> None:
        """Raises the pull's error, or DeadlineExceeded naming what was waited for."""
        while self.error is None and not condition():
            self.changed.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self.changed.wait()
            except TimeoutError:
                raise DeadlineExceeded(f"waiting for {what} of slot {self.ref.slot}") from None
        if self.error is not None:
            # Not the one kept here: its traceback would keep this pull, and with it a mapping.
            raise copy.copy(self.error)

    def check(self, ready: wire.Ready) -> None:
        """Raises TransferFailed unless the message continues the ref's content."""
        ref = self.ref
        size = ref.nbytes if isinstance(ref, EmbeddingRef) else ref.block_nbytes
        nbytes = self.nbytes + sum(piece.nbytes for piece in ready.pieces)
        fits = nbytes == ref.nbytes if ready.last else nbytes <= ref.nbytes
        if ready.first != self.count or not fits or any(p.nbytes != size for p in ready.pieces):
            raise TransferFailed(
                f"pieces {ready.first}+{len(ready.pieces)} (last: {ready.last}) do not continue "
                f"slot {ref.slot} after {self.nbytes} of {ref.nbytes} bytes"
            )


class Loan:
    """An embedding in its producer's memory, claimed and complete. Made by ``Consumer.borrow``.

    Whatever was computed from ``memory`` counts only after a ``validate`` that began when the
    computation had ended. Used from the event loop's thread, but for ``memory`` itself.
    """

    def __init__(
        self,
        pull: Pull,
        memory: Tensor,
        transport: str,
        send: Callable[[wire.Message], None],
        forget: Callable[[int], object],
        timeout_s: float,
    ) -> None:
        self.memory = memory
        """(nbytes,) uint8, not to be written. Mapped for as long as the tensor lives, but its
        content is the embedding's only while the lease lives."""
        self.transport = transport
        self._pull = pull
        self._send = send
        self._forget = forget
        self._timeout_s = timeout_s
        self._asked = 0
        """Validations begun."""

    async def validate(self) -> None:
        """Return if the lease lives still: all that was read until now was right.

        Raises TransferFailed (expired, or released), WorkerLost, DeadlineExceeded, or the error
        with which the producer ended the lease.
        """
        pull = self._pull
        if pull.state is not PullState.IN_PLACE:
            raise TransferFailed(f"slot {pull.ref.slot} is not lent any more")
        self._asked += 1
        number = self._asked  # the answer to an earlier question says nothing of later reads
        self._send(wire.Validate(pull.claim, 0, 1))
        answer_by = asyncio.get_running_loop().time() + self._timeout_s
        await pull.until(lambda: pull.n_valid >= number, answer_by, "validation")
        if pull.state is not PullState.IN_PLACE:
            raise TransferFailed(f"slot {pull.ref.slot} was given back meanwhile")
        pull.step(PullEvent.VALID)

    def release(self) -> None:
        """Give it back. Idempotent."""
        if self._pull.state is PullState.IN_PLACE:
            self._pull.step(PullEvent.RELEASE)
            self._forget(self._pull.claim)
            self._send(wire.Release(self._pull.claim))


class Copy:
    """An embedding that has been read, and whose producer has been asked whether the lease covered
    that. Made by ``Consumer.fetch``. Used from the event loop's thread.

    Whatever is computed from it counts only after ``validate``. Unlike a loan's, its rows cannot
    change any more, so that one answer is about every use.
    """

    def __init__(
        self,
        pull: Pull,
        transport: str,
        send: Callable[[wire.Message], None],
        forget: Callable[[int], object],
        answer_by: float,
    ) -> None:
        self.transport = transport
        self.read_s = pull.read_s
        """Seconds of reading alone, without waiting for the producer."""
        self._pull = pull
        self._send = send
        self._forget = forget
        self._answer_by = answer_by
        send(wire.Validate(pull.claim, 0, 1))

    async def validate(self) -> None:
        """Return once the producer has said that the lease lived when the read had ended; the
        lease ends then. May be called any number of times.

        Raises as ``Loan.validate``.
        """
        pull = self._pull
        try:
            await pull.until(lambda: self._is_known, self._answer_by, "validation")
        finally:
            self.release()
        if pull.state is not PullState.DONE:
            raise TransferFailed(f"slot {pull.ref.slot} was given back before it was proven")

    @property
    def _is_known(self) -> bool:
        return self._pull.n_valid > 0 or self._pull.state is not PullState.VALIDATING

    def release(self) -> None:
        """Give it back. Idempotent. One that is not proven yet will not be."""
        pull = self._pull
        if pull.state is PullState.VALIDATING:
            if pull.n_valid > 0 and pull.error is None:
                pull.step(PullEvent.VALID)
                pull.step(PullEvent.LAST)
            else:
                pull.step(PullEvent.FAIL)
            pull.changed.set()
            self._forget(pull.claim)
            self._send(wire.Release(pull.claim))
