"""What the leader of a group computes, its followers compute too: each call of its runner, sent on.

Only the leader schedules and samples. A follower has a runner of its own on its part of the model
and of the KV cache, and applies to it what the leader's runner was told, in the same order: the
ranks meet in the sums behind their layers. An embedding is read once, by the leader, and broadcast.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import NoReturn, Protocol

import msgspec
import torch
from torch import Tensor

from triptych.engine.attention import Attention
from triptych.engine.runner import Launched, Prompt, Runner
from triptych.engine.sampler import Sampled
from triptych.engine.sequence import Phase, Run, Sequence
from triptych.engine.work import Work
from triptych.models.language import LanguageModel
from triptych.models.parallel import broadcast
from triptych.models.stream import drain
from triptych.request import Sampling

logger = logging.getLogger(__name__)


class Command(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """From a leader to its followers. They are processes of one installation on one host: bytes of
    tensors are in the machine's own order."""


class AddPrompt(Command, frozen=True, tag="add"):
    """A ``Prompt``, and embeddings that are to come."""

    request_id: str
    ids: bytes
    """(tokens,) int64."""
    positions: bytes
    """(axes, tokens) int64."""
    next_position: int
    row_positions: list[int]
    first_rows: list[int]
    n_answered: int


class LandRows(Command, frozen=True, tag="land"):
    """The next broadcast is an image's rows."""

    request_id: str
    item: int
    shape: tuple[int, int, int]


class DropRows(Command, frozen=True, tag="drop"):
    request_id: str
    item: int


class Preempt(Command, frozen=True, tag="preempt"):
    request_id: str
    answer: list[int]


class Forget(Command, frozen=True, tag="forget"):
    request_id: str


class Part(msgspec.Struct, frozen=True, array_like=True):
    """One sequence's ``Work``, and of the sequence what the runner looks at."""

    request_id: str
    start: int
    stop: int
    n_prompt: int
    computed: int
    token: int
    """The newest of the answer; -1: there is none."""
    position: int
    """Of that token, or what it would be."""
    blocks: tuple[int, ...] | None
    """None: those of the last step."""
    runs: tuple[Run, ...]


class Step(Command, frozen=True, tag="step"):
    parts: tuple[Part, ...]


class End(Command, frozen=True, tag="end"):
    """Nothing more will come."""


AnyCommand = AddPrompt | LandRows | DropRows | Preempt | Forget | Step | End


class Followers(Protocol):
    """The other ranks of a group, as the leader's engine thread reaches them."""

    def tell(self, command: Command) -> None:
        """To each of them, without waiting for it to be done. Does not return when one is lost."""

    def give_up(self, reason: str) -> NoReturn:
        """What the ranks hold differs, or may: the group ends, and this process with it."""


class LeadingRunner(Runner):
    """A runner whose every call reaches the followers before it is carried out here.

    What goes wrong after that may have gone wrong on one rank alone, so that the ranks would wait
    for each other in different places: the group ends.
    """

    def __init__(
        self, model: LanguageModel, attention: Attention, places: int, followers: Followers
    ) -> None:
        super().__init__(model, attention, places)
        self._followers = followers
        self._sent: dict[str, tuple[int, ...]] = {}
        """Blocks of each sequence that the followers know."""

    def add(self, request_id: str, prompt: Prompt) -> None:
        super().add(request_id, prompt)
        self._followers.tell(
            AddPrompt(
                request_id,
                _bytes(prompt.ids),
                _bytes(prompt.positions),
                prompt.next_position,
                prompt.row_positions,
                prompt.first_rows,
                prompt.n_answered,
            )
        )

    def land(self, request_id: str, item: int, rows: Tensor) -> None:
        rows = rows.to(self._device).contiguous()
        super().land(request_id, item, rows)  # refused before anybody is told
        planes, n_rows, width = rows.shape
        self._followers.tell(LandRows(request_id, item, (planes, n_rows, width)))
        with self._ending_the_group("an embedding"):
            broadcast(rows)

    def drop_rows(self, request_id: str, item: int) -> None:
        super().drop_rows(request_id, item)
        self._followers.tell(DropRows(request_id, item))

    def preempt(self, request_id: str, answer: Seq[int]) -> None:
        super().preempt(request_id, answer)
        self._followers.tell(Preempt(request_id, list(answer)))

    def forget(self, request_id: str) -> None:
        super().forget(request_id)
        self._sent.pop(request_id, None)
        self._followers.tell(Forget(request_id))

    def logits(self, work: Seq[Work], after: Launched | None = None) -> Tensor | None:
        assert after is None, "followers are told the tokens"
        self._followers.tell(Step(tuple(self._part(w) for w in work)))
        with self._ending_the_group("a step"):
            return super().logits(work)

    def read(self, step: Launched) -> list[Sampled]:
        with self._ending_the_group("a step"):
            return super().read(step)

    @contextmanager
    def _ending_the_group(self, what: str) -> Generator[None]:
        try:
            yield
        except Exception as exc:  # the boundary between processes: others wait for this one
            logger.exception("%s failed", what)
            self._followers.give_up(f"{what} failed: {type(exc).__name__}: {exc}")

    def _part(self, work: Work) -> Part:
        sequence = work.sequence
        known = self._sent.get(sequence.request_id) == sequence.blocks
        self._sent[sequence.request_id] = sequence.blocks
        return Part(
            sequence.request_id,
            work.start,
            work.stop,
            sequence.n_prompt,
            sequence.computed,
            sequence.output[-1] if sequence.output else -1,
            sequence.last_position,
            None if known else sequence.blocks,
            () if work.is_decode else sequence.runs,
        )


class Follower:
    """Applies commands to ``runner``, on the thread that computes."""

    def __init__(self, model: LanguageModel, runner: Runner) -> None:
        self._model = model
        self._runner = runner
        self._blocks: dict[str, tuple[int, ...]] = {}

    def run(self, commands: Iterable[AnyCommand]) -> None:
        """Until ``End``. Raises whatever a rank may raise: the ranks hold different things then,
        and the caller ends the process."""
        for command in commands:
            match command:
                case AddPrompt():
                    self._runner.add(command.request_id, self._prompt(command))
                case LandRows():
                    rows = torch.empty(
                        command.shape, dtype=self._model.dtype, device=self._model.device
                    )
                    broadcast(rows)
                    self._runner.land(command.request_id, command.item, rows)
                case DropRows():
                    self._runner.drop_rows(command.request_id, command.item)
                case Preempt():
                    self._runner.preempt(command.request_id, command.answer)
                case Forget():
                    self._blocks.pop(command.request_id, None)
                    self._runner.forget(command.request_id)
                case Step():
                    self._runner.logits([self._work(part) for part in command.parts])
                    # What the host lends a step is written again for the next one.
                    drain(self._model.device)
                case End():
                    return

    def _prompt(self, command: AddPrompt) -> Prompt:
        device = self._model.device
        positions = _tensor(command.positions).view(self._model.axes, -1)
        return Prompt(
            ids=_tensor(command.ids).to(device),
            positions=positions.to(device),
            next_position=command.next_position,
            row_positions=command.row_positions,
            row_index=torch.tensor(command.row_positions, dtype=torch.int64, device=device),
            first_rows=command.first_rows,
            n_answered=command.n_answered,
        )

    def _work(self, part: Part) -> Work:
        if part.blocks is not None:
            self._blocks[part.request_id] = part.blocks
        answered = part.token >= 0
        sequence = Sequence(
            request_id=part.request_id,
            n_prompt=part.n_prompt,
            n_tokens=part.n_prompt,
            sampling=_SAMPLED_ELSEWHERE,
            arrived=0.0,
            phase=Phase.DECODE if part.start >= part.n_prompt else Phase.PREFILL,
            computed=part.computed,
            output=[part.token] if answered else [],
            next_position=part.position if answered else part.position + 1,
            blocks=self._blocks[part.request_id],
            runs=part.runs,
        )
        return Work(sequence, part.start, part.stop)


_SAMPLED_ELSEWHERE = Sampling(max_tokens=1)


def _bytes(numbers: Tensor) -> bytes:
    return numbers.cpu().contiguous().numpy().tobytes()


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.int64)
