"""A request inside the engine, as plain data: what is known of it and how far it is. No torch."""

from __future__ import annotations

import enum
from collections.abc import Sequence as Seq
from collections.abc import Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from triptych.errors import BadRequest
from triptych.request import ItemMeta, Kind, Sampling

if TYPE_CHECKING:
    from triptych.engine.prefix import BlockNames


class Phase(enum.Enum):
    QUEUED = "waiting for blocks and a place"
    PREFILL = "its prompt is being computed"
    KEPT = "its prompt's KV is kept for a consumer"
    DECODE = "its answer is being computed"
    ENDED = "its blocks are free"


TRANSITIONS: dict[Phase, frozenset[Phase]] = {
    Phase.QUEUED: frozenset({Phase.PREFILL, Phase.ENDED}),
    Phase.PREFILL: frozenset({Phase.DECODE, Phase.KEPT, Phase.QUEUED, Phase.ENDED}),
    Phase.KEPT: frozenset({Phase.ENDED}),
    Phase.DECODE: frozenset({Phase.QUEUED, Phase.ENDED}),
    Phase.ENDED: frozenset(),
}


class Rows(enum.Enum):
    """Where an item's embedding is, as far as its sequence is concerned."""

    AWAY = "nobody has been asked for it"
    ASKED = "it is to be brought"
    LANDED = "it can be read"
    RETURNED = "it was given back unread, or is as soon as it lands"
    USED = "its KV exists: it was given back"


class Trust(enum.Enum):
    """What is known of an item's rows that landed."""

    PROVEN = "they are right"
    COMING = "they were read under a lease of which word is on its way"
    BORROWED = "they are in their producer's memory: its owner is asked after each use"


@dataclass(frozen=True, slots=True)
class ItemSpan:
    """An image or a video as the prompt sees it."""

    rows: int
    grid: tuple[int, int, int] | None
    """(t, h, w) in patches for models with M-RoPE, else None."""
    kind: Kind = "image"
    second_per_grid: float | None = None
    key: str = ""
    """Of its content; "": not known, and KV behind it is never found again."""

    @classmethod
    def of(cls, meta: ItemMeta) -> ItemSpan:
        return cls(meta.rows, meta.grid, meta.kind, meta.second_per_grid, meta.key)


@dataclass(slots=True)
class Item:
    """An image of one sequence. Its rows stand at ``start .. stop`` of the prompt, where other
    tokens may stand between them."""

    start: int
    stop: int
    rows: int
    where: Rows = Rows.AWAY
    trust: Trust = Trust.PROVEN

    @property
    def settled(self) -> bool:
        """Nothing has to be waited for."""
        return self.where in (Rows.LANDED, Rows.USED)


Run = tuple[int, int]
"""Start and stop of rows that stand next to each other in a prompt."""


@dataclass(eq=False, slots=True)
class Reservation:
    """Blocks held for a sequence whose prompt is being computed elsewhere."""

    request_id: str
    n_tokens: int
    arrived: float
    blocks: tuple[int, ...] = ()
    order: int = 0
    """Of arrival."""


@dataclass(eq=False, slots=True)
class Sequence:
    """Positions count tokens from the start of the prompt; the KV of ``0 .. computed`` exists."""

    request_id: str
    n_prompt: int
    """Tokens that are given, not sampled: the prompt, and what was ``resumed`` of the answer."""
    n_tokens: int
    """What its blocks must hold in the end."""
    sampling: Sampling
    arrived: float
    """Wall-clock seconds."""
    items: tuple[Item, ...] = ()
    keep_kv: bool = False
    phase: Phase = Phase.QUEUED
    computed: int = 0
    output: list[int] = field(default_factory=list)
    next_position: int = 0
    """Position id of the first generated token, equal on every M-RoPE axis."""
    blocks: tuple[int, ...] = ()
    order: int = 0
    """Of arrival."""
    resumed: int = 0
    """Tokens of ``output`` that ``n_prompt`` counts."""
    reserved: bool = False
    """Its blocks were: it has all it will ever need, and is never preempted."""
    names: BlockNames | None = None
    """Of its blocks; None: they are not to be found again."""
    named: int = 0
    """Blocks that have been named, or were found."""
    passed: int = 0
    """Tokens of others that were computed while it waited for images."""
    foreseen: int = -1
    """Tokens whose KV was there when its images were first asked for; -1: not yet."""
    cramped: bool = False
    """Its images do not fit where they land all at once."""
    scheduled: float | None = None
    """When it was first part of a step, wall-clock seconds; None: not yet."""
    decoding_since: float | None = None
    decoded: int = 0
    """Tokens that decode steps have brought."""
    runs: tuple[Run, ...] = ()
    """In order; only of models that compute a run as a whole."""

    def become(self, phase: Phase) -> None:
        assert phase in TRANSITIONS[self.phase], f"{self.phase} -> {phase}"
        self.phase = phase

    def preempt(self) -> None:
        """Back to the queue without blocks: what there is of the answer is prompt from now on, and
        rows that were used are needed once more."""
        self.become(Phase.QUEUED)
        self.computed, self.named, self.blocks = 0, 0, ()
        self.n_prompt += len(self.output) - self.resumed
        self.resumed = len(self.output)
        for item in self.items:
            if item.where is Rows.USED:
                item.where = Rows.AWAY

    def land(self, index: int, trust: Trust) -> bool:
        """An image's rows are here; False if they are not wanted (any more)."""
        if not 0 <= index < len(self.items):
            return False
        item = self.items[index]
        assert item.where is not Rows.LANDED, "an image lands once"
        lent = trust is Trust.BORROWED
        if item.where is Rows.USED or (item.where is Rows.RETURNED and not lent):
            return False
        item.where, item.trust = Rows.LANDED, trust
        return True

    def vouch(self, index: int) -> None:
        """What was read of the image is known to be right."""
        item = self.items[index]
        if item.where is Rows.LANDED and item.trust is Trust.COMING:
            item.trust = Trust.PROVEN

    def give_back(self) -> list[int]:
        """The images whose rows are here; they, and those that are still to come, are let go
        until they are asked for again. Those that are lent where they are stay."""
        self.foreseen = -1
        here = []
        for index, item in enumerate(self.items):
            if item.where is Rows.LANDED and item.trust is not Trust.BORROWED:
                here.append(index)
                item.where = Rows.RETURNED
            elif item.where is Rows.ASKED:
                item.where = Rows.RETURNED
        return here

    @property
    def left(self) -> int:
        """Tokens of its prompt that are still to be computed."""
        return self.n_prompt - self.computed

    @property
    def complete(self) -> bool:
        """Every image has landed, or will most likely not be needed."""
        return all(item.settled or item.stop <= self.foreseen for item in self.items)

    @property
    def ready_until(self) -> int:
        """Prompt tokens before the first row that has not landed."""
        return next((item.start for item in self.items if not item.settled), self.n_prompt)

    def is_text_at(self, start: int) -> bool:
        """From ``start`` on there is only text before an image that has not landed."""
        return next((not item.settled for item in self.items if item.stop > start), False)

    def uncut(self, stop: int) -> int:
        """``stop``, or the start of the run that a chunk up to there would cut."""
        return next((first for first, last in self.runs if first < stop < last), stop)

    def doubtful_between(self, start: int, stop: int) -> tuple[int, ...]:
        """Images between these positions whose rows are not known to be, or to have been, right."""
        return tuple(
            index
            for index, item in enumerate(self.items)
            if item.trust is not Trust.PROVEN and item.start < stop and start < item.stop
        )

    @property
    def last_position(self) -> int:
        """Position id of the newest generated token."""
        return self.next_position + len(self.output) - 1

    def accept(self, token: int) -> str:
        """Append a generated token; "stop", "length" or "" for why the answer ends with it."""
        self.output.append(token)
        if self.names is not None:
            self.names.extend((token,))
        if token in self.sampling.stop_ids:
            return "stop"
        return "length" if len(self.output) >= self.sampling.max_tokens else ""


def locate_items(
    token_ids: Seq[int], row_token_ids: Set[int], spans: Seq[ItemSpan]
) -> tuple[tuple[Item, ...], list[int]]:
    """Where each item's rows stand in the prompt, and the positions of all rows in order.

    ``row_token_ids``: the tokens that stand for rows. Raises BadRequest if the prompt has not
    exactly one of them for each row.
    """
    ids = np.asarray(token_ids)
    row_positions: list[int] = np.flatnonzero(np.isin(ids, list(row_token_ids))).tolist()
    n_rows = sum(span.rows for span in spans)
    if len(row_positions) != n_rows or any(span.rows < 1 for span in spans):
        raise BadRequest(
            f"the prompt has {len(row_positions)} tokens for rows, its {len(spans)} images and "
            f"videos have {n_rows} rows"
        )
    items, first = [], 0
    for span in spans:
        last = first + span.rows - 1
        items.append(Item(row_positions[first], row_positions[last] + 1, span.rows))
        first = last + 1
    return tuple(items), row_positions


def runs_of(row_positions: Seq[int]) -> tuple[Run, ...]:
    """``row_positions``: increasing."""
    runs: list[Run] = []
    for position in row_positions:
        if runs and runs[-1][1] == position:
            runs[-1] = (runs[-1][0], position + 1)
        else:
            runs.append((position, position + 1))
    return tuple(runs)
