"""The leader's side of a group of ranks: it starts the others, and ends with them.

A group lives and dies as one: a rank that is lost cannot be replaced, since the others' KV is worth
nothing without its part. So the leader's process ends too, at once (what a GPU computes for a rank
that is gone can be ended in no other way); its peers and the router see a worker that is lost.
The process side is ``stage/follower.py``.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import msgspec
import torch

from triptych.capabilities import TransportOffer
from triptych.config import EngineConfig, ModelConfig, Timeouts, TransportName
from triptych.engine.mirror import Command, End
from triptych.errors import WorkerLost, rebuild
from triptych.models.loading import rank_device
from triptych.models.parallel import join, leave
from triptych.ranks import Pipe, PipeClosed, Rank
from triptych.transfer.ranked import RankedTransport, RemoteRank
from triptych.transfer.transports.base import Transport
from triptych.transfer.transports.http import ReadPool

logger = logging.getLogger(__name__)
EXIT_GIVEN_UP = 3
"""Exit status of a leader whose group has ended."""
ENDING_S = 1.0
"""Between the closing of a follower's pipes and its end."""
FIRST_MESSAGE_S = 60.0
"""From a follower's start to its hearing who it is."""


class Start(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a follower is told first."""

    role: str
    rank: int
    size: int
    store: str
    """Of ``models.parallel.join``."""
    model: ModelConfig
    """On this rank's device."""
    engine: EngineConfig
    timeouts: Timeouts


class Here(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="here"):
    """A follower is where all ranks meet, and waits for ``Go``."""


class NotHere(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="not_here"):
    """It never will be."""

    error: str
    """Class name in the error tree."""
    reason: str


class Go(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="go"):
    """All ranks are here."""


class OpenPool(Command, frozen=True, tag="open_pool"):
    """Take the memory of the KV cache. The last that ranks meet for before the first request."""

    nonce: str
    """Of the leader's process: see ``rank_nonce``."""
    nbytes: int
    """Of KV blocks, at the start of the region: as many as the leader has."""
    transport: TransportName | None
    """By which the pool can be read and peers' can; None: nobody does."""
    host: str
    """Name for peers on other hosts."""


_answers: msgspec.msgpack.Decoder[Here | NotHere] = msgspec.msgpack.Decoder(Here | NotHere)


def encode_start(start: Start) -> bytes:
    return msgspec.msgpack.encode(start, enc_hook=_plain)


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(type(value).__name__)


@dataclass
class _Follower:
    index: int
    process: subprocess.Popen[bytes]
    commands: Pipe
    side: Pipe
    """To its ``RankLinks``. Its closing ends the process."""

    def how_it_ended(self) -> str:
        try:
            return f"ended with exit status {self.process.wait(ENDING_S)}"
        except subprocess.TimeoutExpired:
            return "is silent"


class RankGroup:
    """The followers' processes. Started by the constructor, which does not wait for them.

    Used by one thread at a time; ``close`` and ``give_up`` by any.
    """

    def __init__(
        self, role: str, model: ModelConfig, engine: EngineConfig, timeouts: Timeouts
    ) -> None:
        self.rank = Rank(0, engine.tensor_parallel)
        self._timeouts = timeouts
        self._device = torch.device(rank_device(model.device, 0))
        self._folder = tempfile.TemporaryDirectory(prefix="triptych-ranks-")
        self._store = Path(self._folder.name) / "store"
        self._closing = threading.Event()
        self._followers: list[_Follower] = []
        self._remotes: list[RemoteRank] = []
        try:
            for index in range(1, self.rank.size):
                start = Start(
                    role=role,
                    rank=index,
                    size=self.rank.size,
                    store=str(self._store),
                    model=replace(model, device=rank_device(model.device, index)),
                    engine=engine,
                    timeouts=timeouts,
                )
                self._followers.append(_start(start))
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ starting together

    def join(self) -> None:
        """Make this process and the followers one group of ``torch.distributed``."""
        self.meet()
        join(self.rank, self._store, self._device, self._timeouts.rank)

    def meet(self) -> None:
        """See ``ranks.Group``. Raises what kept a follower from coming, or WorkerLost."""
        deadline = time.monotonic() + self._timeouts.rank_start
        for follower in self._followers:
            try:
                answer = follower.commands.receive(_answers, deadline - time.monotonic())
            except (PipeClosed, TimeoutError) as exc:
                raise WorkerLost(f"rank {follower.index} {follower.how_it_ended()}") from exc
            if isinstance(answer, NotHere):
                raise rebuild(answer.error, f"rank {follower.index}: {answer.reason}", item=None)
        for follower in self._followers:
            follower.commands.send(Go())

    def open_pools(self, pool: OpenPool) -> None:
        """Let every rank take its part of the KV cache. Raises as ``meet``."""
        self.tell(pool)
        self.meet()
        self._remotes = [RemoteRank(each.index, each.side) for each in self._followers]

    def watch(self) -> None:
        """From now on this process ends when a follower does."""
        for follower in self._followers:
            threading.Thread(
                target=self._watch, args=(follower,), name=f"rank-{follower.index}", daemon=True
            ).start()

    # ------------------------------------------------------------------ working together

    def spread(self, transports: Mapping[str, Transport]) -> dict[str, Transport]:
        """The same, whose links are links of all ranks."""
        return {kind: RankedTransport(own, self._remotes) for kind, own in transports.items()}

    def offers(self, own: Sequence[TransportOffer]) -> tuple[TransportOffer, ...]:
        """Of the followers, for the kinds of which the leader has an offer of its ``own``.

        Raises TransferFailed when a follower does not say.
        """
        kinds = {offer.kind: offer for offer in own}
        found = []
        for remote in self._remotes:
            for offer in remote.offers(self._timeouts.rank):
                if offer.kind in kinds:
                    # The server is the leader's, also for what is in a follower's memory.
                    address = offer.address or kinds[offer.kind].address
                    found.append(msgspec.structs.replace(offer, address=address))
        return tuple(found)

    def read_pools(self) -> tuple[ReadPool, ...]:
        """Of each follower, in order."""
        return tuple(
            partial(remote.read_pool, timeout_s=self._timeouts.transfer) for remote in self._remotes
        )

    def tell(self, command: Command) -> None:
        """See ``engine.mirror.Followers``."""
        body = msgspec.msgpack.encode(command)
        for follower in self._followers:
            try:
                follower.commands.send_bytes(body)
            except PipeClosed as exc:
                self.give_up(f"rank {follower.index} takes no commands: {exc}")

    def give_up(self, reason: str) -> NoReturn:
        """See ``engine.mirror.Followers``."""
        logger.critical("the group of %d ranks ends: %s", self.rank.size, reason)
        for follower in self._followers:
            follower.process.kill()
        os._exit(EXIT_GIVEN_UP)

    # ------------------------------------------------------------------ ending together

    def close(self) -> None:
        """End the followers. The engine has ended before. Idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        for follower in self._followers:
            try:
                follower.commands.send(End())
            except PipeClosed:
                continue  # it has ended by itself
        leave()
        for follower in self._followers:
            follower.commands.close()  # which it waits for
        deadline = time.monotonic() + self._timeouts.rank
        for follower in self._followers:
            try:
                follower.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                logger.warning("rank %d did not end and is killed", follower.index)
                follower.process.kill()
                follower.process.wait()
            follower.side.close()
        self._folder.cleanup()

    def _watch(self, follower: _Follower) -> None:
        follower.process.wait()
        if not self._closing.is_set():
            self.give_up(f"rank {follower.index} {follower.how_it_ended()}")


def _start(start: Start) -> _Follower:
    pipes = [socket.socketpair() for _ in range(2)]
    theirs = [end.fileno() for _, end in pipes]
    process = subprocess.Popen(
        [sys.executable, "-m", "triptych.stage.follower", *map(str, theirs)],
        stdin=subprocess.DEVNULL,
        pass_fds=theirs,
        process_group=0,  # Ctrl-C reaches the leader alone, which decides when all end
    )
    for _, end in pipes:
        end.close()
    commands, side = (Pipe(end, start.timeouts.rank) for end, _ in pipes)
    commands.send_bytes(encode_start(start))
    return _Follower(start.rank, process, commands, side)
