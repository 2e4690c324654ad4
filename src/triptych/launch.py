"""``triptych serve``: the roles of a topology as child processes of this one.

A child writes to a log file of its own and is in a process group of its own, so that Ctrl-C
reaches the launcher alone and the launcher decides who ends when: the router first, while the
workers can still finish its requests. Every child holds the reading end of a pipe whose writing
end only the launcher has: when the launcher is gone, however it went, they end too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from asyncio.subprocess import DEVNULL, STDOUT, Process
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
from rich.console import Console

from triptych.config import Secrets, ServeConfig, Timeouts
from triptych.credentials import environment_of_children
from triptych.errors import ConfigError, DeadlineExceeded, WorkerLost
from triptych.topology import Command, commands, router_url

logger = logging.getLogger(__name__)

POLL_S = 0.2
"""Between two looks at the router's /ready."""
KILL_AFTER_S = Timeouts().drain + 5.0
"""A child that was asked to end and has not by then is killed."""
RESTARTS = 5
"""How often a worker that ends is started again, unless it ran for ``STEADY_S``."""
STEADY_S = 60.0
RESTART_S = 0.5
"""Before it is."""
TAIL_LINES = 15
"""How much of a dead child's log is shown."""

Say = Callable[[str], None]


def free_port(host: str) -> int:
    """A port that nobody listens on at this moment."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def end_with_parent(pipe: int) -> None:
    """End this process when the other end of ``pipe`` closes. -1: there is no parent to watch.

    Raises ConfigError if ``pipe`` is not a descriptor of this process.
    """
    if pipe < 0:
        return
    try:
        os.fstat(pipe)
    except OSError as exc:
        raise ConfigError(f"--parent-pipe {pipe}: {exc.strerror}") from exc

    def watch() -> None:
        os.read(pipe, 1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(KILL_AFTER_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


@dataclass
class Child:
    command: Command
    process: Process
    log: Path
    restarts: int = 0
    """Since it last ran for ``STEADY_S``."""
    started: float = field(default_factory=time.monotonic)
    """Of the process that runs now."""

    def failure(self) -> WorkerLost:
        """Why it ended, as far as it said, and the end of its log."""
        code = self.process.returncode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        reason = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        tail = "\n".join(f"  | {line}" for line in lines)
        head = f"{self.command.name} ended ({how}): {reason.removeprefix('error: ')}"
        return WorkerLost(f"{head}\nend of {self.log}:\n{tail}")


class Children:
    """The processes of one topology: started on entry, ended on exit. ``url`` is the router's."""

    def __init__(self, config: ServeConfig, secrets: Secrets, say: Say) -> None:
        port = config.port or free_port(config.host)
        self.config = replace(config, port=port)
        self.url = router_url(self.config)
        self.running: list[Child] = []
        self._secrets = secrets
        self._say = say
        self._ends: dict[asyncio.Task[int], Child] = {}
        self._hurry = asyncio.Event()
        self._pipe = (-1, -1)
        """What children hold to see that this process lives, and its other end."""
        self._logs = Path()

    async def __aenter__(self) -> Self:
        self._pipe = os.pipe()
        try:
            self._logs = self.config.log_folder or Path(tempfile.mkdtemp(prefix="triptych-"))
            self._logs.mkdir(parents=True, exist_ok=True)
            for command in commands(replace(self.config, parent_pipe=self._pipe[0])):
                log = self._logs / f"{command.name}.log"
                log.write_bytes(b"")
                child = Child(command, await self._spawn(command, log), log)
                self.running.append(child)
                self._watch(child)
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self.stop()

    async def _spawn(self, command: Command, log: Path) -> Process:
        with log.open("ab") as file:
            return await asyncio.create_subprocess_exec(
                *command.argv,
                stdin=DEVNULL,
                stdout=file,
                stderr=STDOUT,
                pass_fds=(self._pipe[0],),
                env=environment_of_children(self._secrets),
                process_group=0,
            )

    def _watch(self, child: Child) -> None:
        child.started = time.monotonic()
        self._ends[asyncio.create_task(child.process.wait())] = child
        self._say(f"{child.command.name}: pid {child.process.pid}, log {child.log}")

    async def ready(self) -> None:
        """Until the topology is in effect with every worker that was started.

        Raises WorkerLost when a child ends before that, with its reason and the end of its log;
        DeadlineExceeded after ``start_timeout``.
        """
        answering = asyncio.create_task(self._answering())
        try:
            await asyncio.wait(
                {answering, *self._ends},
                timeout=self.config.start_timeout,
                return_when=asyncio.FIRST_COMPLETED,
            )
            self._check_alive()
            if not answering.done():
                raise DeadlineExceeded(
                    f"not ready after {self.config.start_timeout:g} s; the logs are in "
                    f"{self.running[0].log.parent}"
                )
            await answering
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)

    async def _answering(self) -> None:
        """Ask the router until it knows every worker, and tell what it waits for."""
        told: str | None = None
        limit = aiohttp.ClientTimeout(total=Timeouts().rpc)
        async with aiohttp.ClientSession(timeout=limit) as client:
            while True:
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with client.get(f"{self.url}/ready") as answer:
                        waiting = (await answer.json())["reason"]
                    if waiting is None:
                        return
                    if waiting != told:
                        self._say(f"router: {waiting}")
                    told = waiting
                await asyncio.sleep(POLL_S)

    async def keep(self) -> None:
        """Start workers again that end. Raises WorkerLost when the router ends, or a worker more
        than ``RESTARTS`` times in a row."""
        while True:
            ended, _ = await asyncio.wait(self._ends, return_when=asyncio.FIRST_COMPLETED)
            for end in ended:
                child = self._ends.pop(end)
                if time.monotonic() - child.started > STEADY_S:
                    child.restarts = 0
                if child is self.running[0] or child.restarts >= RESTARTS:
                    raise child.failure()
                self._say(str(child.failure()))
                child.restarts += 1
                await asyncio.sleep(RESTART_S)
                child.process = await self._spawn(child.command, child.log)
                self._watch(child)

    def _check_alive(self) -> None:
        for end, child in self._ends.items():
            if end.done():
                raise child.failure()

    def hurry(self) -> None:
        """Kill what is still ending."""
        self._hurry.set()

    async def stop(self) -> None:
        """End every child: the router with its requests, then the workers. Idempotent."""
        if self._pipe[0] < 0:
            return
        ends = list(self._ends.items())
        for group in (ends[:1], ends[1:]):
            await self._stop(group)
        for end in self._pipe:
            os.close(end)
        self._pipe = (-1, -1)

    async def _stop(self, group: list[tuple[asyncio.Task[int], Child]]) -> None:
        ending = asyncio.create_task(_all_ended(group))
        hurry = asyncio.create_task(self._hurry.wait())
        _signal(group, signal.SIGTERM)
        await asyncio.wait(
            {ending, hurry}, timeout=KILL_AFTER_S, return_when=asyncio.FIRST_COMPLETED
        )
        hurry.cancel()
        _signal(group, signal.SIGKILL)
        await ending


async def _all_ended(group: list[tuple[asyncio.Task[int], Child]]) -> None:
    if group:
        await asyncio.wait([end for end, _ in group])


def _signal(group: list[tuple[asyncio.Task[int], Child]], number: signal.Signals) -> None:
    for end, child in group:
        if not end.done():
            with contextlib.suppress(ProcessLookupError):
                child.process.send_signal(number)


async def serve(config: ServeConfig, secrets: Secrets) -> int:
    """Run a topology's children until SIGINT, SIGTERM or SIGHUP, or until the router ends.

    The exit status. Raises WorkerLost or DeadlineExceeded as ``Children.ready`` does.
    """
    console = Console(stderr=True, highlight=False, markup=False)
    begin = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[{time.monotonic() - begin:5.1f} s] {text}", soft_wrap=True)

    stop = asyncio.Event()
    children = Children(config, secrets, say)

    def end() -> None:
        children.hurry() if stop.is_set() else stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, end)
    stopping = asyncio.create_task(stop.wait())
    running = asyncio.create_task(_run(children, console, say))
    await asyncio.wait({stopping, running}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not running.done():
        say("ending (once more to kill)")
        running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    return 0


async def _run(children: Children, console: Console, say: Say) -> None:
    async with children:
        with console.status("starting"):
            await children.ready()
        say(f"{children.config.topology} is ready at {children.url}/v1")
        await children.keep()
