"""An engine whose turns a test takes itself, so that what arrives between two of them is exact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal
from unittest.mock import patch

from tests.end_to_end.engine_driver import CLOSE_S, Driver, Family
from triptych.engine import loop
from triptych.engine.runner import Launched
from triptych.engine.sampler import Sampled
from triptych.engine.sequence import Phase
from triptych.engine.work import Work
from triptych.models.stream import settle

Mode = Literal["on", "off"]


class Turns(Driver):
    """Notes what is launched and read."""

    def __init__(self, family: Family, run_ahead: Mode, **config: Any) -> None:
        super().__init__(family.language, run_ahead=run_ahead, **config)
        self.calls: list[tuple[str, tuple[Work, ...]]] = []
        self.thrown_away = 0
        runner = self.engine._runner
        self._launch, self._read = runner.launch, runner.read
        runner.launch, runner.read = self.launch, self.read  # type: ignore[method-assign]

    def __enter__(self) -> Turns:
        with patch.object(loop, "settle_thread", settle):  # this thread does other things too
            assert self.engine._warm_up()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close(CLOSE_S)

    def launch(self, work: tuple[Work, ...], after: Launched | None = None) -> Launched:
        self.calls.append(("ahead" if after else "launch", work))
        return self._launch(work, after)

    def read(self, step: Launched) -> list[Sampled]:
        self.calls.append(("read", step.work))
        self.thrown_away += sum(w.sequence.phase is Phase.ENDED for w in step.work)
        return self._read(step)

    def turn(self) -> bool:
        """False: it had nothing to do."""
        assert self.engine._take_messages(wait=False)
        busy = self.engine._turn()
        self.check_blocks()
        while not self._outputs.empty():
            self._take(self._outputs.get())
        return busy or not self.engine._inbox.empty()

    def turns(self, until: Callable[[], bool] = lambda: False) -> None:
        while self.turn() and not until():
            pass

    def check_blocks(self) -> None:
        """Each sequence has its blocks, and nobody else has them but to read them."""
        blocks = self.engine._scheduler.blocks
        holders = Counter(block for held in blocks._held.values() for block in held)
        assert [holders[block] for block in range(blocks.n_blocks)] == blocks._holders
        assert all(n == 1 or block in blocks._names for block, n in holders.items())
        for sequence in self.engine._scheduler.running:
            assert sequence.blocks == tuple(blocks._held.get(sequence.request_id, ()))

    @property
    def n_ahead(self) -> int:
        return sum(call == "ahead" for call, _ in self.calls)
