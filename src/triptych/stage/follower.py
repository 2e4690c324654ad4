"""A rank that follows: a process that computes its part of what its leader computes.

It serves nobody: no HTTP, no channel, no scheduler. Its main thread loads, meets the others and
then applies the leader's commands; another reads and lends KV as the leader says, and sees to it
that this process ends with the leader's. Whatever goes wrong once it has begun ends it, and with it
the group (``stage/ranks.py``).
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from triptych.engine.backends import Compute, compile_layers, longest
from triptych.engine.memory import kv_nbytes
from triptych.engine.mirror import AnyCommand, Follower
from triptych.engine.selftest import selftest
from triptych.errors import TriptychError, WorkerLost
from triptych.models.language import LanguageModel
from triptych.models.loading import load_language
from triptych.models.parallel import join, leave
from triptych.models.stream import settle_thread
from triptych.observe import log
from triptych.ranks import Pipe, PipeClosed, Rank
from triptych.stage.ranks import FIRST_MESSAGE_S, Go, Here, NotHere, OpenPool, Start
from triptych.transfer.device_region import open_region
from triptych.transfer.rank_links import RankLinks
from triptych.transfer.ranked import AnyTask, rank_nonce
from triptych.transfer.transports.base import Transport
from triptych.transfer.transports.choice import open_transports

logger = logging.getLogger(__name__)
EXIT_REFUSED = 2
"""Exit status after ``NotHere``: the leader has been told why."""
EXIT_LEFT = 4
"""The leader is gone."""

_commands: msgspec.msgpack.Decoder[AnyCommand] = msgspec.msgpack.Decoder(AnyCommand)
_go = msgspec.msgpack.Decoder(Go)
_pool = msgspec.msgpack.Decoder(OpenPool)
_tasks: msgspec.msgpack.Decoder[AnyTask] = msgspec.msgpack.Decoder(AnyTask)


class Member:
    """This rank's view of its group."""

    def __init__(self, start: Start, commands: Pipe) -> None:
        self.rank = Rank(start.rank, start.size)
        self._commands = commands
        self._timeout_s = start.timeouts.rank_start

    def meet(self) -> None:
        """See ``ranks.Group``."""
        self._commands.send(Here())
        try:
            self._commands.receive(_go, self._timeout_s)
        except TimeoutError:
            raise WorkerLost("the other ranks did not come") from None

    def pool(self) -> OpenPool:
        """What the leader wants of this rank's memory."""
        return self._commands.receive(_pool, self._timeout_s)

    def commands(self) -> Iterator[AnyCommand]:
        """What the leader says, for as long as it lives: an idle group waits without an end, and
        the leader's own end is noticed by ``_serve``."""
        while True:
            yield self._commands.receive(_commands)


def main(arguments: list[str]) -> int:
    """``arguments``: descriptors of the two pipes to the leader. The exit status."""
    first, second = (socket.socket(fileno=int(each)) for each in arguments)
    commands, side = Pipe(first, FIRST_MESSAGE_S), Pipe(second, FIRST_MESSAGE_S)
    decoder = msgspec.msgpack.Decoder(Start, dec_hook=_from_plain)
    start = commands.receive(decoder, FIRST_MESSAGE_S)
    log.setup(f"{start.role}.{start.rank}")
    links: Future[RankLinks] = Future()
    threading.Thread(target=_serve, args=(side, links), name="leader", daemon=True).start()
    member = Member(start, commands)
    try:
        model = _load(start, member)
        memory = _open_pool(start, model, member, side, links)
    except TriptychError as exc:
        logger.error("rank %d: %s", start.rank, exc.message)
        commands.send(NotHere(type(exc).__name__, exc.message))
        return EXIT_REFUSED
    compute = Compute(model, memory, start.engine, longest(model, start.engine))
    settle_thread(model.device, start.engine.threads)
    compute.warm_up()
    compute.capture()
    Follower(model, compute.runner).run(member.commands())
    compute.runner.let_go()
    links.result().close()
    leave()
    with suppress(PipeClosed, TimeoutError):
        # The leader closes the pipe when it has left too. To its communicator a process that has
        # ended before is one that was lost, and torch ends a process for that.
        commands.receive(_commands, start.timeouts.rank)
    return 0


def _load(start: Start, member: Member) -> LanguageModel:
    """In step with the leader's ``create_language_stage``."""
    if start.engine.threads:
        torch.set_num_threads(start.engine.threads)
    member.meet()
    device = torch.device(start.model.device)
    join(member.rank, Path(start.store), device, start.timeouts.rank)
    model = load_language(start.model, member)
    compile_layers(model, start.engine, start.model)
    if start.engine.selftest:
        selftest(model, start.engine)
    return model


def _open_pool(
    start: Start, model: LanguageModel, member: Member, side: Pipe, links: Future[RankLinks]
) -> Tensor:
    """The KV cache's memory, (nbytes,) uint8. In step with the leader's ``EngineHost``."""
    kv_nbytes(
        model, start.engine, start.model.memory_fraction, 0
    )  # may compute; the leader's holds
    pool = member.pool()
    region = open_region(pool.nbytes, rank_nonce(pool.nonce, start.rank), model.device)
    offset = region.carve(pool.nbytes)
    transports: dict[str, Transport] = {}
    if pool.transport is not None:
        transports = open_transports(pool.transport, region, url="", host=pool.host)
    links.set_result(RankLinks(start.rank, region, transports, start.timeouts, side))
    member.meet()
    return region.tensor(offset, (pool.nbytes,), torch.uint8)


def _serve(side: Pipe, links: Future[RankLinks]) -> None:
    """Do the leader's transfers, and end this process when the leader's has ended, whatever it is
    doing."""
    while True:
        try:
            task = side.receive(_tasks)
        except PipeClosed:
            os._exit(EXIT_LEFT)
        links.result().handle(task)


def _from_plain(kind: type[Path], value: str) -> Path:
    return kind(value)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    os._exit(status)  # the interpreter would take torch apart for a second or more
