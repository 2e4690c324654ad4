"""Decode steps that are launched before the last one's tokens are read: by FlashInfer, compiled and
captured, in bfloat16."""

from __future__ import annotations

import queue
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest
import torch

from tests.gpu.test_engine import BLOCK, DEVICE, model
from triptych.config import EngineConfig
from triptych.engine.backends import Compute
from triptych.engine.kv_cache import KVShape
from triptych.engine.loop import Engine
from triptych.engine.messages import AddRequest, StepOutput
from triptych.engine.runner import Launched, Prompt, Runner
from triptych.engine.sequence import Phase, Sequence
from triptych.engine.work import Work
from triptych.models.language import LanguageModel
from triptych.models.stream import settle
from triptych.request import Sampling, TokenEvent

__all__ = ["model"]  # a fixture
STEP_S = 60.0
ASLEEP_S = 1.0
SAMPLINGS = (
    Sampling(max_tokens=40, temperature=0, logprobs=2),
    Sampling(max_tokens=25, temperature=0.8, top_p=0.9, seed=3),
    Sampling(max_tokens=33, temperature=0),
    Sampling(max_tokens=12, temperature=1.0, top_k=20, seed=4, choice=1, logprobs=3),
    Sampling(max_tokens=40, temperature=0, logprobs=0),
)


def requests(samplings: tuple[Sampling, ...]) -> list[AddRequest]:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(10, 900, (9 + 23 * i,), generator=generator) for i in range(5)]
    return [
        AddRequest(f"r{i}", tuple(ids.tolist()), (), sampling)
        for i, (ids, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]


def answers(
    model: LanguageModel, run_ahead: str, asked: list[AddRequest], chunk_tokens: int = 64
) -> dict[str, list[TokenEvent]]:
    outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
    config = EngineConfig(
        kv_mib=16,
        chunk_tokens=chunk_tokens,
        max_sequences=8,
        run_ahead=run_ahead,  # type: ignore[arg-type]
    )
    engine = Engine(model, None, config, outputs.put)
    for message in asked:  # before it starts: the same prompts meet in the same steps
        engine.submit(message)
    engine.start().result(600)
    assert engine._compute.runs_ahead == (run_ahead == "auto")
    found: dict[str, list[TokenEvent]] = defaultdict(list)
    while sum(bool(events[-1].finish) for events in found.values()) < len(asked):
        output = outputs.get(timeout=STEP_S)
        assert not output.failed
        for event in output.tokens:
            found[event.request_id].append(event)
    engine.close(STEP_S)
    assert engine._scheduler.blocks.n_free == engine._compute.n_blocks
    return found


def test_the_answers_are_the_same(model: LanguageModel) -> None:
    """All end by their length, so that every step has the same sequences either way."""
    ahead, after = (answers(model, each, requests(SAMPLINGS)) for each in ("auto", "off"))
    for name, expected in after.items():
        got = ahead[name]
        assert [(e.index, e.token, e.finish) for e in got] == [
            (e.index, e.token, e.finish) for e in expected
        ]
        for mine, theirs in zip(got, expected, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)
            assert [top.token for top in mine.top] == [top.token for top in theirs.top]


@pytest.mark.parametrize("chunk_tokens", [64, 1200])
def test_chunks_are_launched_before_the_last_one_is_read(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, chunk_tokens: int
) -> None:
    """A long prompt alone, and one beside decodes. Large chunks attend to keys and values in one
    piece on Hopper."""
    n_ahead: Counter[str] = Counter()
    launch = Runner.launch

    def noted(runner: Runner, work: tuple[Work, ...], after: Launched | None = None) -> Launched:
        if after is not None and not work[-1].is_decode:
            n_ahead["beside decodes" if len(work) > 1 else "alone"] += 1
        return launch(runner, work, after)

    monkeypatch.setattr(Runner, "launch", noted)
    generator = torch.Generator().manual_seed(2)
    sizes = (4 * chunk_tokens + 17, 9, 5 * chunk_tokens + 3)
    greedy = Sampling(max_tokens=60, temperature=0, logprobs=2)
    prompts = [torch.randint(10, 900, (n,), generator=generator).tolist() for n in sizes]
    asked = [AddRequest(f"r{i}", tuple(ids), (), greedy) for i, ids in enumerate(prompts)]
    for kind, which in (("alone", asked[:1]), ("beside decodes", asked[1:])):
        n_ahead.clear()
        ahead, after = (answers(model, each, which, chunk_tokens) for each in ("auto", "off"))
        assert n_ahead[kind] >= 2
        for name, expected in after.items():
            assert [e.token for e in ahead[name]] == [e.token for e in expected]
            for mine, theirs in zip(ahead[name], expected, strict=True):
                assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)


def test_answers_that_stop_leave_nothing_behind(model: LanguageModel) -> None:
    """A row that is computed in vain can change the order of sums for the others, so a tie may be
    broken in another way: up to there the answers are the same."""
    greedy = Sampling(max_tokens=40, temperature=0, logprobs=2)
    whole = answers(model, "off", requests((greedy,) * 5))
    samplings = tuple(
        Sampling(
            max_tokens=40, temperature=0, logprobs=2, stop_ids=(whole[f"r{i}"][4 + 5 * i].token,)
        )
        for i in range(5)
    )
    ahead, after = (answers(model, each, requests(samplings)) for each in ("auto", "off"))
    n_same = 0
    for name, expected in after.items():
        for mine, theirs in zip(ahead[name], expected, strict=False):
            if mine.token != theirs.token:
                assert theirs.top[0].logprob - theirs.top[1].logprob < 0.05
                break
            assert mine.finish == theirs.finish
            n_same += 1
    assert n_same > sum(len(events) for events in after.values()) / 2


@pytest.fixture
def decoding(model: LanguageModel) -> tuple[Runner, list[Sequence]]:
    """A runner with captured steps, and sequences whose prompts it has computed."""
    shape = KVShape(model.num_layers, model.num_kv_heads, model.head_dim, model.dtype)
    memory = torch.zeros(40 * shape.block_nbytes(BLOCK), dtype=torch.uint8, device=DEVICE)
    settle(model.device)
    compute = Compute(model, memory, EngineConfig(chunk_tokens=64, max_sequences=4), 128)
    compute.warm_up()
    compute.capture()
    sequences = []
    for i, sampling in enumerate(SAMPLINGS[:4]):
        n = 9 + 7 * i
        sequence = Sequence(f"r{i}", n, n + 40, sampling, 0.0, phase=Phase.DECODE)
        sequence.blocks = tuple(range(5 * i, 5 * i + 5))
        prompt = Prompt.build(model, list(range(10, 10 + n)), (), [])
        sequence.next_position = prompt.next_position
        compute.runner.add(sequence.request_id, prompt)
        step = compute.runner.launch((Work(sequence, 0, n),))
        sequence.output = [each.token for each in compute.runner.read(step)]
        sequence.computed = n
        sequences.append(sequence)
    return compute.runner, sequences


@pytest.fixture
def unsynchronised() -> Iterator[None]:
    """Whatever waits for the device is an error, but for reading a step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not notice everything
        torch.cuda.set_sync_debug_mode("error")
        yield
        torch.cuda.set_sync_debug_mode("default")


def work(sequences: list[Sequence], ahead: int) -> tuple[Work, ...]:
    return tuple(Work(s, s.computed + ahead, s.computed + ahead + 1) for s in sequences)


def read(runner: Runner, step: Launched) -> list[int]:
    tokens = [each.token for each in runner.read(step)]
    for w, token in zip(step.work, tokens, strict=True):
        w.sequence.output.append(token)
        w.sequence.computed = w.stop
    return tokens


@pytest.mark.parametrize("stays", [(0, 1, 2, 3), (0, 3)])
def test_launching_waits_for_nothing(
    decoding: tuple[Runner, list[Sequence]], unsynchronised: None, stays: tuple[int, ...]
) -> None:
    """A step is read, and another launched behind it, while the device has not begun that one."""
    runner, sequences = decoding
    going = [sequences[i] for i in stays]
    for _ in range(3):  # page-locked memory for all of them is there from now on
        first = runner.launch(work(sequences, 0))
        second = runner.launch(work(going, 1), first)
        read(runner, first)
        read(runner, second)
    first = runner.launch(work(sequences, 0))
    torch.cuda._sleep(int(ASLEEP_S * 1.5e9))  # cycles: a second, more or less
    began = time.monotonic()
    second = runner.launch(work(going, 1), first)
    read(runner, first)
    took = time.monotonic() - began
    assert second.mark._event is not None and not second.mark._event.query()
    assert took < ASLEEP_S / 4
    assert len(read(runner, second)) == len(stays)
