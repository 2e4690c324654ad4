"""What goes into the engine and what comes out. The engine thread and its owner share nothing else.

In: a language worker sends ``AddRequest`` and ``ItemLanded`` (and, for rows that may not be
right, ``Vouched``, ``Proven`` or ``Lapsed``; ``Cramped`` where memory for rows is short); a prefill
worker the same with ``keep_kv``; a decode worker ``Reserve`` and ``StartDecode``; all of them
``Cancel``. A message for a request that the engine does not know is ignored: it may have been
cancelled a moment ago. Out: one ``StepOutput`` for everything that one turn of the loop brought.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from triptych.engine.sequence import ItemSpan, Trust
from triptych.errors import TriptychError
from triptych.request import Sampling, Span, TokenEvent

# ------------------------------------------------------------------ in


@dataclass(frozen=True, slots=True)
class AddRequest:
    """Compute a prompt, then its answer."""

    request_id: str
    token_ids: tuple[int, ...]
    """The prompt; each item's rows are the next ``rows`` tokens that stand for rows."""
    items: tuple[ItemSpan, ...]
    sampling: Sampling
    keep_kv: bool = False
    """Stop after the first token and keep the prompt's KV blocks until ``Cancel``."""
    resumed: tuple[int, ...] = ()
    """Tokens of the answer that exist already: computed behind the prompt, not sampled again."""


@dataclass(frozen=True, slots=True)
class ItemLanded:
    """An image's embedding is in this process's memory, asked for (``StepOutput.wanted``) or not.

    The engine reads ``rows`` in place; every ``ItemLanded`` is answered by one entry of
    ``StepOutput.consumed``, also when the request has ended, and the memory is free from then on.
    """

    request_id: str
    item: int
    rows: Tensor
    """(planes, rows, width), on any device."""
    trust: Trust = Trust.PROVEN
    """What is computed from rows that are not ``PROVEN`` is withheld until ``Proven`` says that
    they were right when they were read (``StepOutput.used`` asks for it)."""


@dataclass(frozen=True, slots=True)
class Proven:
    """The rows of ``Used`` number ``serial`` were valid when they were used."""

    request_id: str
    serial: int


@dataclass(frozen=True, slots=True)
class Vouched:
    """The image's rows, which landed as ``COMING``, are right: steps that end from now on need not
    ask. It comes for each that landed so, unless its rows were given back or the request was
    cancelled before."""

    request_id: str
    item: int


@dataclass(frozen=True, slots=True)
class Lapsed:
    """The image's borrowed rows cannot be trusted any more: what was computed from them and is
    not proven is forgotten, and another ``ItemLanded`` is to come in place of the first."""

    request_id: str
    item: int


@dataclass(frozen=True, slots=True)
class Cramped:
    """The rest of the request's images can land only when some that are there have been used."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Reserve:
    """Take blocks for ``n_tokens`` (prompt and answer) whose first KV comes from elsewhere."""

    request_id: str
    n_tokens: int


@dataclass(frozen=True, slots=True)
class StartDecode:
    """The KV of ``n_prompt`` tokens is in the reserved blocks: go on after ``first``."""

    request_id: str
    n_prompt: int
    """Of the prompt and of ``resumed``."""
    first: TokenEvent
    next_position: int
    """Position id of the answer's token 0."""
    sampling: Sampling
    resumed: tuple[int, ...] = ()
    """The answer's tokens before ``first``."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """End the request and free its blocks. Memory that a transfer may still write must not be
    cancelled before that transfer is drained."""

    request_id: str


Message = (
    AddRequest | ItemLanded | Vouched | Proven | Lapsed | Cramped | Reserve | StartDecode | Cancel
)

# ------------------------------------------------------------------ out


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the prompt of a ``keep_kv`` request is. The host has seen the blocks computed.

    An output may hold several of a request; the last says all.
    """

    request_id: str
    computed: int
    """Tokens whose KV is in the cache."""
    blocks: tuple[int, ...]
    """All blocks that will not be written again, from the first, in the order of the prompt."""


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A ``keep_kv`` request is done: what the decode worker needs besides the blocks."""

    request_id: str
    first: TokenEvent
    next_position: int


@dataclass(frozen=True, slots=True)
class Reserved:
    request_id: str
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Used:
    """A step has read rows that may not be right; its results wait for ``Proven`` or ``Lapsed``."""

    request_id: str
    serial: int
    """Of this question; never asked twice."""
    items: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """All results of one turn. ``progress`` is to be handled before ``prefilled``."""

    tokens: tuple[TokenEvent, ...] = ()
    progress: tuple[Progress, ...] = ()
    prefilled: tuple[Prefilled, ...] = ()
    """In the same output as the request's last ``Progress`` and its first token's event."""
    used: tuple[Used, ...] = ()
    consumed: tuple[tuple[str, int], ...] = ()
    """(request id, item) whose landed rows will not be read again."""
    withdrawn: tuple[str, ...] = ()
    """Requests whose rows that are still on their way are not wanted for now. To be handled after
    ``consumed``; what lands all the same is ``consumed`` at once."""
    wanted: tuple[tuple[str, int], ...] = ()
    """(request id, item) whose rows are to land, the most urgent first. Asked again for rows that
    were ``consumed`` or withdrawn, so to be handled after both. Nothing is to be done for rows
    that are on their way."""
    needless: tuple[tuple[str, int], ...] = ()
    """(request id, item) whose KV was found and whose rows are not needed. What is on its way all
    the same is ``consumed`` when it lands."""
    failed: tuple[tuple[str, TriptychError], ...] = ()
    reserved: tuple[Reserved, ...] = ()
    spans: tuple[tuple[str, Span], ...] = ()
