"""An engine that launches decode steps before the last one's tokens are known gives what one gives
that does not."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.end_to_end.engine_driver import CLOSE_S, Case, Driver, Family
from tests.end_to_end.turns import Mode, Turns
from triptych.config import EngineConfig
from triptych.engine.loop import Engine
from triptych.engine.messages import (
    Cancel,
    ItemLanded,
    Lapsed,
    Message,
    Proven,
    Reserve,
    StartDecode,
    StepOutput,
    Vouched,
)
from triptych.engine.sequence import Trust
from triptych.errors import ConfigError, TriptychError
from triptych.request import Sampling, TokenEvent

torch.set_num_threads(1)
MODES: tuple[Mode, ...] = ("off", "on")
BLOCK = 4
GREEDY = Sampling(max_tokens=16, temperature=0)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("qwen3_vl"), "qwen3_vl")


@pytest.fixture(scope="module")
def cases(family: Family) -> list[Case]:
    return [family.case("text", 0), family.case("one", 1), family.case("two", 2)]


def same(got: list[TokenEvent], expected: list[TokenEvent]) -> None:
    assert [(e.index, e.token, e.finish) for e in got] == [
        (e.index, e.token, e.finish) for e in expected
    ]
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [x.token for x in mine.top] == [x.token for x in theirs.top]


# ---------------------------------------------------------------------- one step after the other


def test_a_step_is_launched_before_the_last_one_is_read(family: Family, cases: list[Case]) -> None:
    with Turns(family, "on") as driver:
        driver.add(cases[0], Sampling(max_tokens=4, temperature=0))
        driver.turns()
    assert driver.answer("text") == cases[0].answer[:4]
    n = len(cases[0].token_ids)
    assert [(call, work[0].start - n) for call, work in driver.calls] == [
        ("launch", -n), ("read", -n),
        ("launch", 0), ("ahead", 1), ("read", 0),
        ("ahead", 2), ("read", 1),
        ("read", 2),
    ]  # fmt: skip


def test_it_can_be_turned_off(family: Family, cases: list[Case]) -> None:
    with Turns(family, "off") as driver:
        driver.add(cases[0])
        driver.turns()
    assert driver.answer("text") == cases[0].answer and driver.n_ahead == 0
    assert not Driver(family.language, run_ahead="auto").engine._compute.runs_ahead
    with pytest.raises(ConfigError, match="run-ahead"):
        Engine(family.language, None, EngineConfig(tensor_parallel=2, run_ahead="on"), print)


def test_what_is_computed_behind_the_end_is_thrown_away(family: Family, cases: list[Case]) -> None:
    text = cases[0]
    stop = text.answer[3]
    n = text.answer.index(stop) + 1
    with Turns(family, "on") as driver:
        driver.add(text, Sampling(max_tokens=16, temperature=0, stop_ids=(stop,)))
        driver.turns(lambda: driver.ended("text"))
        assert (
            driver.engine._launched is not None and driver.free_blocks == driver.engine.kv.n_blocks
        )
        driver.turns()
        assert driver.answer("text") == text.answer[:n]
        assert driver.events("text")[-1].finish == "stop"
        assert driver.thrown_away == 1 and driver.engine._launched is None


def test_a_request_may_come_again_while_its_last_step_computes(
    family: Family, cases: list[Case]
) -> None:
    """Of that step nothing is its own."""
    text, other = cases[0], cases[1]
    with Turns(family, "on", chunk_tokens=64) as driver:
        driver.add(text, name="again")
        driver.turns(lambda: len(driver.answer("again")) == 3)
        assert driver.engine._launched is not None
        driver.engine.submit(Cancel("again"))
        driver.tokens.clear()
        driver.add(other, name="again")
        driver.turns()
        assert driver.answer("again") == other.answer and driver.thrown_away == 1


def test_a_decode_goes_on_beside_a_prompt_that_waits_for_its_image(
    family: Family, cases: list[Case]
) -> None:
    text, one, _ = cases
    with Turns(family, "on", chunk_tokens=64) as driver:
        driver.add(text)
        driver.turns(lambda: bool(driver.tokens))
        driver.engine.submit(one.request())
        before = driver.n_ahead
        driver.turns(lambda: len(driver.answer("text")) > 6)
        assert driver.n_ahead > before + 2
        driver.engine.submit(ItemLanded("one", 0, one.rows[0]))
        driver.turns()
        assert driver.answer("text") == text.answer and driver.answer("one") == one.answer


@pytest.mark.parametrize("where", ["launch", "read"])
def test_a_step_that_fails_ends_its_own_requests_once(
    family: Family, cases: list[Case], where: str
) -> None:
    with Turns(family, "on") as driver:
        driver.add(cases[0], GREEDY, name="long")
        driver.add(cases[0], Sampling(max_tokens=3, temperature=0), name="short")
        driver.turns(lambda: len(driver.answer("short")) == 2)
        assert driver.engine._launched is not None

        def broken(*_: object) -> Any:
            setattr(driver.engine._runner, where, getattr(driver, where))
            raise RuntimeError("no")

        setattr(driver.engine._runner, where, broken)
        failed: list[str] = []
        while driver.turn():
            failed += [name for output in driver.outputs for name, _ in output.failed]
            driver.outputs.clear()
        assert sorted(failed) == (["long"] if where == "launch" else ["long", "short"])
        assert isinstance(driver.failed["long"], TriptychError)
        assert driver.ended("short")
        driver.add(cases[1])
        driver.turns()
        assert driver.answer("one") == cases[1].answer
        assert driver.free_blocks == driver.engine.kv.n_blocks


def test_closing_waits_for_what_is_launched(family: Family, cases: list[Case]) -> None:
    with Turns(family, "on") as driver:
        driver.add(cases[0])
        driver.turns(lambda: len(driver.answer("text")) == 4)
        driver.engine.close(CLOSE_S)
        driver.calls.clear()
        driver.engine._warm_up = lambda: True  # type: ignore[method-assign]
        driver.engine._loop()
        assert [call for call, _ in driver.calls] == ["read"]
        driver._take(driver._outputs.get(timeout=1))
        assert driver.answer("text") == cases[0].answer[:5]
        assert "closed" in driver.failed["text"].message


# ---------------------------------------------------------------------- anything at any time


@dataclass
class Script:
    """What arrives before each turn, and how large the engine is."""

    config: dict[str, Any]
    arrivals: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    cancels: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    asked: dict[str, tuple[Case, Sampling]] = field(default_factory=dict)
    handed_over: set[str] = field(default_factory=set)
    borrowed: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    """Whose rows land before they are vouched for."""

    @classmethod
    def of(cls, seed: int, cases: list[Case]) -> Script:
        random = Random(seed)
        most = max(len(case.token_ids) for case in cases) + 20
        script = cls(
            {
                "block_size": BLOCK,
                "n_blocks": random.choice([-(-most // BLOCK), 3 * most // (2 * BLOCK), 200]),
                "chunk_tokens": random.choice([24, 64]),
                "max_sequences": random.choice([2, 4, 16]),
                "overlap": random.choice(["adaptive", "off", "always"]),
                "prefix_cache": random.random() < 0.7,
            }
        )
        for number in range(random.randint(5, 12)):
            name = f"r{number}"
            case = random.choice(cases)
            drawn = random.random() < 0.5
            sampling = Sampling(
                max_tokens=random.randint(1, 18),
                temperature=0.9 if drawn else 0,
                top_p=0.95 if drawn else 1.0,
                seed=random.randrange(3),
                choice=random.randrange(2),
                logprobs=random.choice([-1, 0, 2]),
                stop_ids=tuple(random.sample(case.answer, 2) if random.random() < 0.4 else ()),
            )
            script.asked[name] = case, sampling
            arrival = random.randrange(30)
            script.arrivals[arrival].append(name)
            if random.random() < 0.25:
                script.cancels[arrival + random.randrange(1, 20)].append(name)
            if random.random() < 0.2 and sampling.max_tokens > 1:
                script.handed_over.add(name)
            elif random.random() < 0.3:
                script.borrowed.add(name)
            elif random.random() < 0.5:
                script.read.add(name)
        return script

    @property
    def cancelled(self) -> set[str]:
        return {name for names in self.cancels.values() for name in names}


class Played(Turns):
    """The script, with whoever lends rows, and a prefill worker beside the engine."""

    def __init__(self, family: Family, mode: Mode, script: Script, elsewhere: Elsewhere) -> None:
        super().__init__(family, mode, **script.config)
        self._script = script
        self._elsewhere = elsewhere
        self._random = Random(1)
        self._late: list[tuple[Message, ...]] = []
        """Messages from elsewhere that will come at some time."""

    def play(self) -> None:
        script = self._script
        last = max([0, *script.arrivals, *script.cancels])
        turn = 0
        while turn <= last or self.turn() or self._late:
            for name in script.arrivals.get(turn, ()):
                self._arrive(name)
            for name in script.cancels.get(turn, ()):
                self.engine.submit(Cancel(name))
            late, self._late = self._late, []
            for messages in late:
                if self._random.random() < 0.5:
                    self._late.append(messages)
                    continue
                for message in messages:
                    self.engine.submit(message)
                    if isinstance(message, ItemLanded) and message.trust is Trust.COMING:
                        self._late.append((Vouched(message.request_id, message.item),))
            self.turn()
            turn += 1

    def _arrive(self, name: str) -> None:
        case, sampling = self._script.asked[name]
        if name in self._script.handed_over:
            self.engine.submit(Reserve(name, len(case.token_ids) + sampling.max_tokens))
        else:
            self.add(case, sampling, name=name)

    def _land(self, name: str, item: int) -> None:
        if name not in self._script.borrowed | self._script.read:
            super()._land(name, item)
        elif (name, item) not in self._held:
            self._held.add((name, item))
            rows = self._cases[name].rows[item]
            trust = Trust.BORROWED if name in self._script.borrowed else Trust.COMING
            self._late.append((ItemLanded(name, item, rows, trust),))

    def _take(self, output: StepOutput) -> None:
        super()._take(output)
        for used in output.used:
            item = used.items[0]
            if used.request_id in self._script.borrowed and self._random.random() < 0.2:
                rows = self._cases[used.request_id].rows[item]
                again = ItemLanded(used.request_id, item, rows, trust=Trust.BORROWED)
                self._late.append((Lapsed(used.request_id, item), again))
            else:
                self._late.append((Proven(used.request_id, used.serial),))
        for reserved in output.reserved:
            self._hand_over(reserved.request_id, reserved.blocks)

    def _hand_over(self, name: str, blocks: tuple[int, ...]) -> None:
        case, sampling = self._script.asked[name]
        content, message = self._elsewhere.prefilled_there(case, sampling)
        for here, block in zip(blocks, content, strict=False):
            self.engine.kv.data[here] = block
        self._late.append((replace(message, request_id=name),))


class Elsewhere:
    """Engines that do not run ahead, with one request each: what its answer is, and its prompt's
    KV for one that takes it over."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._answers: dict[tuple[str, Sampling], list[TokenEvent]] = {}

    def answer(self, case: Case, sampling: Sampling) -> list[TokenEvent]:
        key = case.name, sampling
        if key not in self._answers:
            with Turns(self._family, "off") as driver:
                driver.add(case, sampling)
                driver.turns()
                self._answers[key] = driver.events(case.name)
        return self._answers[key]

    def prefilled_there(self, case: Case, sampling: Sampling) -> tuple[Tensor, StartDecode]:
        with Turns(self._family, "off", block_size=BLOCK) as driver:
            driver.add(case, sampling, keep_kv=True)
            driver.turns()
            blocks = list(driver.progress[case.name][-1].blocks)
            done = driver.prefilled[case.name]
            message = StartDecode("", len(case.token_ids), done.first, done.next_position, sampling)
            return driver.engine.kv.data[blocks].clone(), message


@pytest.fixture(scope="module")
def elsewhere(family: Family) -> Elsewhere:
    return Elsewhere(family)


@pytest.mark.parametrize("group", range(4))
def test_whatever_arrives_whenever_the_answers_are_the_same(
    family: Family, cases: list[Case], elsewhere: Elsewhere, group: int
) -> None:
    n_ahead = thrown_away = preempted = 0
    for seed in range(10 * group, 10 * group + 10):
        script = Script.of(seed, cases)
        for mode in MODES:
            with Played(family, mode, script, elsewhere) as driver:
                driver.play()
            assert driver.failed == {}
            for name, (case, sampling) in script.asked.items():
                expected = elsewhere.answer(case, sampling)[name in script.handed_over :]
                got = driver.events(name)
                same(got, expected[: len(got)] if name in script.cancelled else expected)
            assert driver.free_blocks == driver.engine.kv.n_blocks
            assert driver._held == set(), "rows that nobody gave back"
            assert driver.engine.usage["pinned"] == 0
            requests = driver.engine._requests
            assert not (requests.sequences or requests.reservations or requests.withheld._entries)
            assert mode == "on" or driver.n_ahead == 0
            n_ahead += driver.n_ahead
            thrown_away += driver.thrown_away
            preempted += sum(len(driver.notes(name, "preempted")) for name in script.asked)
    assert n_ahead > 100 and thrown_away > 1 and preempted > 0
