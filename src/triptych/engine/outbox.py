"""The results of one turn of the loop while they are put together."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from triptych.engine.messages import Prefilled, Progress, Reserved, StepOutput, Used
from triptych.engine.sampler import Sampled
from triptych.engine.sequence import Sequence
from triptych.engine.work import Work
from triptych.errors import TriptychError
from triptych.request import Span, TokenEvent


@dataclass(frozen=True, slots=True)
class Result:
    """What one step brought one sequence."""

    work: Work
    sampled: Sampled | None
    started: float
    """Wall-clock seconds, as ``ended``."""
    ended: float


@dataclass(slots=True)
class Outbox:
    """The fields of ``StepOutput``, as lists."""

    tokens: list[TokenEvent] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)
    prefilled: list[Prefilled] = field(default_factory=list)
    used: list[Used] = field(default_factory=list)
    consumed: list[tuple[str, int]] = field(default_factory=list)
    withdrawn: list[str] = field(default_factory=list)
    wanted: list[tuple[str, int]] = field(default_factory=list)
    needless: list[tuple[str, int]] = field(default_factory=list)
    failed: list[tuple[str, TriptychError]] = field(default_factory=list)
    reserved: list[Reserved] = field(default_factory=list)
    spans: list[tuple[str, Span]] = field(default_factory=list)

    def seal(self) -> StepOutput | None:
        """Everything so far, or None if there is nothing."""
        lists = {each.name: tuple(getattr(self, each.name)) for each in fields(self)}
        return StepOutput(**lists) if any(lists.values()) else None

    def span(self, request_id: str, name: str, start: float, end: float, note: str = "") -> None:
        self.spans.append((request_id, Span(name=name, start=start, end=end, note=note)))

    def lend(self, sequence: Sequence, computed: int, block_size: int) -> None:
        """A consumer may read its full blocks; of a whole prompt the last one as well."""
        whole = computed == sequence.n_prompt
        n_blocks = len(sequence.blocks) if whole else computed // block_size
        self.progress.append(Progress(sequence.request_id, computed, sequence.blocks[:n_blocks]))

    def token(self, sequence: Sequence, sampled: Sampled, finish: str) -> TokenEvent:
        """The event of the sequence's newest token."""
        event = TokenEvent(
            request_id=sequence.request_id,
            index=len(sequence.output) - 1,
            token=sampled.token,
            finish=finish,
            logprob=sampled.logprob,
            top=sampled.top,
        )
        self.tokens.append(event)
        return event
