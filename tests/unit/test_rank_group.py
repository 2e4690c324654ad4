"""What a leader makes of followers that do not come, refuse, fall silent or will not end."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

import msgspec
import pytest

from triptych.config import EngineConfig, ModelConfig, Timeouts
from triptych.engine.mirror import AnyCommand, Command, End, Forget
from triptych.errors import UnsupportedModel, WorkerLost
from triptych.ranks import Pipe
from triptych.stage import ranks
from triptych.stage.follower import Member, _from_plain
from triptych.stage.ranks import Go, Here, NotHere, RankGroup, Start, encode_start

TIMEOUTS = replace(Timeouts(), rank=0.2, rank_start=0.2)
ENGINE = EngineConfig(tensor_parallel=2)
commands: msgspec.msgpack.Decoder[AnyCommand] = msgspec.msgpack.Decoder(AnyCommand)
go = msgspec.msgpack.Decoder(Go)


class Group(RankGroup):
    def give_up(self, reason: str) -> NoReturn:
        raise InterruptedError(reason)


class Stand:
    """Stands where a follower would: its ends of the pipes, and a process that does nothing."""

    def __init__(self) -> None:
        pairs = [socket.socketpair() for _ in range(2)]
        self.commands, self.side = (Pipe(end, 1.0) for _, end in pairs)
        self.leaders = [Pipe(end, 1.0) for end, _ in pairs]
        self.process = subprocess.Popen(["sleep", "60"])
        self.started: list[Start] = []

    def start(self, start: Start) -> Any:
        self.started.append(start)
        return ranks._Follower(start.rank, self.process, *self.leaders)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.commands, self.side, *self.leaders):
            pipe.close()


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    made = Stand()
    monkeypatch.setattr(ranks, "_start", made.start)
    yield made
    made.end()


@pytest.fixture
def group(stand: Stand) -> Iterator[Group]:
    model = ModelConfig("some/model", device="cpu")
    made = Group("prefill", model, ENGINE, TIMEOUTS)
    yield made
    made.close()


def test_a_follower_is_told_who_it_is(group: Group, stand: Stand) -> None:
    (start,) = stand.started
    assert (start.role, start.rank, start.size, start.model.device) == ("prefill", 1, 2, "cpu")
    decoder = msgspec.msgpack.Decoder(Start, dec_hook=_from_plain)
    assert decoder.decode(encode_start(start)) == start


def test_all_meet(group: Group, stand: Stand) -> None:
    stand.commands.send(Here())
    group.meet()
    assert stand.commands.receive(go, 1.0) == Go()


def test_why_a_follower_will_not_come(group: Group, stand: Stand) -> None:
    stand.commands.send(NotHere("UnsupportedModel", "its weights lack 3 tensors"))
    with pytest.raises(UnsupportedModel, match="rank 1: its weights lack 3 tensors"):
        group.meet()


def test_a_follower_that_ended(group: Group, stand: Stand) -> None:
    stand.process.kill()
    stand.commands.close()
    with pytest.raises(WorkerLost, match="rank 1 ended with exit status -9"):
        group.meet()


def test_a_follower_that_says_nothing(
    group: Group, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "ENDING_S", 0.05)
    with pytest.raises(WorkerLost, match="rank 1 is silent"):
        group.meet()


def test_commands_reach_every_follower(group: Group, stand: Stand) -> None:
    sent: list[Command] = [Forget("a"), Forget("b")]
    for command in sent:
        group.tell(command)
    assert [stand.commands.receive(commands, 1.0) for _ in sent] == sent


def test_a_follower_that_takes_no_commands_ends_the_group(group: Group, stand: Stand) -> None:
    stand.commands.close()
    with pytest.raises(InterruptedError, match="rank 1 takes no commands"):
        group.tell(Forget("a"))


def test_followers_are_asked_to_end_and_then_made_to(group: Group, stand: Stand) -> None:
    group.close()
    assert stand.commands.receive(commands, 1.0) == End()
    assert stand.process.poll() == -9
    group.close()


def test_a_follower_waits_for_the_others_no_longer_than_agreed(stand: Stand) -> None:
    model = ModelConfig("some/model")
    start = Start("decode", 1, 2, "", model, ENGINE, TIMEOUTS)
    member = Member(start, stand.commands)
    with pytest.raises(WorkerLost, match="the other ranks did not come"):
        member.meet()
