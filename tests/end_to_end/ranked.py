"""A group of two ranks under test: this process leads, a process of its own follows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from tests.end_to_end.engine_driver import Driver, Family
from triptych.config import MIB, EngineConfig, ModelConfig, Timeouts
from triptych.models.loading import load_language
from triptych.stage.ranks import OpenPool, RankGroup


class Group(RankGroup):
    """Whose end is not the end of the tests' process."""

    def give_up(self, reason: str) -> NoReturn:
        raise RuntimeError(f"the group ends: {reason}")


BLOCK_SIZE = 4
PATIENT = replace(Timeouts(), rank=120.0)
"""For a machine that does other things too."""


class RankedFamily(Family):
    """A family's whole model, its language half, and the same half on two ranks.

    The group is one of the process: only one such may be open at a time.
    """

    def __init__(self, folder: Path, family: str, device: str = "cpu") -> None:
        config = ModelConfig(str(folder), "float32", device)
        engine = EngineConfig(
            kv_mib=1, block_size=BLOCK_SIZE, threads=1, tensor_parallel=2, selftest=False
        )
        # The follower imports what it needs meanwhile, and waits before it reads the model.
        self.group = Group("language", config, engine, PATIENT)
        try:
            super().__init__(folder, family)
            self.group.join()
            self.first_rank = load_language(config, self.group)
            self.group.open_pools(OpenPool("nonce", engine.kv_mib * MIB, None, ""))
        except BaseException:
            self.close()
            raise

    def lead(self, **config: Any) -> Driver:
        """An engine on both ranks; one after the other, since the follower has one cache."""
        return Driver(self.first_rank, self.group, block_size=BLOCK_SIZE, **config)

    def close(self) -> None:
        self.group.close()
