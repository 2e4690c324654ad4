"""A client's disconnect frees everything soon after the running steps end, wherever its request is.

What is measured has the step that runs in it, and the time that looking at three workers takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.deployed import Deployed
from tests.fault.forks import Forks
from tests.fault.leaving import COUNTS, OPTIONS, STATES, Leaving
from tests.yardstick import slowness, yardstick
from triptych.demo.tiny import make_tiny_model

FREE_S = 0.1
TRIES = 5


@pytest.fixture(scope="module")
def leaving(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Leaving]:
    root: Path = tmp_path_factory.mktemp("leaving")
    model = make_tiny_model(root / "model", "qwen3_vl")
    with Deployed(forks, model, COUNTS, root, OPTIONS) as deployed, Leaving(deployed) as found:
        found.leave("encode", stream=True)  # what is imported and allocated at first use
        yield found


@pytest.mark.timed
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("state", STATES)
def test_everything_is_free_soon(leaving: Leaving, state: str, stream: bool) -> None:
    """A busy machine makes some tries late; what a timer or a poll held back would all be."""
    yards, tries = [], []
    for _ in range(TRIES):
        yards.append(yardstick())
        tries.append(leaving.leave(state, stream=stream).all_s)
    assert min(tries) <= FREE_S * slowness(yards), tries
