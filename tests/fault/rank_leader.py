"""A leader and its follower, busy.

Says on stdout which process follows, then answers one request after the other, each with a line.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import replace

import torch

from triptych.config import MIB, EngineConfig, ModelConfig, Timeouts
from triptych.engine.loop import Engine
from triptych.engine.messages import AddRequest, StepOutput
from triptych.models.loading import load_language
from triptych.observe import log
from triptych.request import Sampling
from triptych.stage.ranks import OpenPool, RankGroup

SAMPLING = Sampling(max_tokens=20, temperature=0)


def main(arguments: Sequence[str]) -> None:
    """``arguments``: the model's folder, seconds of ranks' patience with each other."""
    model, patience_s = arguments[0], float(arguments[1])
    log.setup("leader")
    torch.set_num_threads(1)
    config = ModelConfig(model, load_format="dummy")
    settings = EngineConfig(kv_mib=1, threads=1, tensor_parallel=2, selftest=False)
    group = RankGroup("leader", config, settings, replace(Timeouts(), rank=patience_s))
    group.join()
    language = load_language(config, group)
    group.open_pools(OpenPool("nonce", MIB, None, ""))
    outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
    engine = Engine(language, None, settings, outputs.put, group)
    group.watch()
    engine.start().result()
    print(group._followers[0].process.pid, flush=True)
    number = 0
    while True:
        engine.submit(AddRequest(str(number), (5, 6, 7), (), SAMPLING))
        while not any(event.finish for event in outputs.get().tokens):
            continue
        number += 1
        print("answered", flush=True)
