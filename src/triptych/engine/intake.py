"""From a message to a sequence that can be scheduled; what cannot be is refused here."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence as Seq

from triptych.engine.messages import AddRequest, Reserve, StartDecode
from triptych.engine.prefix import BlockNames
from triptych.engine.runner import Prompt
from triptych.engine.sequence import Phase, Reservation, Run, Sequence, locate_items, runs_of
from triptych.errors import BadRequest, PromptTooLong
from triptych.models.language import LanguageModel


class Intake:
    """``max_tokens``: longest prompt plus answer. ``named_blocks``: tokens of a block, if what is
    computed may be found again, else 0."""

    def __init__(self, model: LanguageModel, max_tokens: int, named_blocks: int) -> None:
        self._model = model
        self._max_tokens = max_tokens
        self._named_blocks = named_blocks

    def prompt(self, message: AddRequest) -> tuple[Sequence, Prompt]:
        """Raises BadRequest and PromptTooLong."""
        sampling = message.sampling
        n_prompt, resumed = len(message.token_ids), message.resumed
        if n_prompt < 1 or sampling.max_tokens <= len(resumed):
            raise BadRequest("a request needs a prompt and at least one token of answer")
        n_tokens = n_prompt + sampling.max_tokens
        if n_tokens > self._max_tokens:
            raise PromptTooLong(
                f"{n_prompt} prompt tokens and {sampling.max_tokens} of answer are more than "
                f"the {self._max_tokens} that this worker takes"
            )
        token_ids = self._checked((*message.token_ids, *resumed))
        prompt_ids = token_ids[:n_prompt]
        items, row_positions = locate_items(prompt_ids, self._model.row_token_ids, message.items)
        sequence = Sequence(
            request_id=message.request_id,
            n_prompt=n_prompt + len(resumed),
            n_tokens=n_prompt + len(resumed) if message.keep_kv else n_tokens,
            sampling=sampling,
            arrived=time.time(),
            items=items,
            runs=self._runs(row_positions),
            keep_kv=message.keep_kv,
            output=list(resumed),
            resumed=len(resumed),
        )
        if self._named_blocks:
            sequence.names = BlockNames(
                token_ids,
                items,
                message.items,
                row_positions,
                self._named_blocks,
                sequence.runs,
            )
        prompt = Prompt.build(self._model, prompt_ids, message.items, row_positions, resumed)
        sequence.next_position = prompt.next_position
        return sequence, prompt

    def reservation(self, message: Reserve) -> Reservation:
        """Raises PromptTooLong."""
        if message.n_tokens > self._max_tokens:
            raise PromptTooLong(
                f"{message.n_tokens} tokens are more than the {self._max_tokens} that this "
                "worker takes"
            )
        return Reservation(message.request_id, message.n_tokens, time.time())

    def answer(self, message: StartDecode, reservation: Reservation) -> Sequence:
        """Whose prompt was computed elsewhere. Raises BadRequest and PromptTooLong."""
        assert reservation.blocks, "decode starts in blocks that were granted"
        n_tokens = message.n_prompt - len(message.resumed) + message.sampling.max_tokens
        if n_tokens > reservation.n_tokens:
            raise PromptTooLong(
                f"{n_tokens} tokens are more than the {reservation.n_tokens} reserved"
            )
        self._checked((*message.resumed, message.first.token))
        now = time.time()
        return Sequence(
            request_id=message.request_id,
            n_prompt=message.n_prompt,
            n_tokens=reservation.n_tokens,
            sampling=message.sampling,
            arrived=now,
            phase=Phase.DECODE,
            computed=message.n_prompt,
            output=[*message.resumed, message.first.token],
            next_position=message.next_position,
            resumed=len(message.resumed),
            reserved=True,
            scheduled=now,
        )

    def _runs(self, row_positions: list[int]) -> tuple[Run, ...]:
        longest = self._model.longest_run
        if not longest:
            return ()
        runs = runs_of(row_positions)
        if any(last - first > longest for first, last in runs):
            raise BadRequest(f"more than {longest} rows of images stand next to each other")
        return runs

    def _checked(self, token_ids: Seq[int]) -> array[int]:
        """The same. Raises BadRequest: an id outside the vocabulary would fail the whole step, on
        some devices the process."""
        known, rows = range(self._model.vocab_size), self._model.row_token_ids
        if min(token_ids) < 0 or max(token_ids) >= known.stop:
            for token in set(token_ids) - rows:
                if token not in known:
                    raise BadRequest(f"token {token} is not in the model's vocabulary")
        return array("q", token_ids)
