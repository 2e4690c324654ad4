"""The command line, derived from the fields of the configuration dataclasses.

Nothing heavy is imported before the role is known: ``triptych --help`` loads no torch.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import tyro
import uvloop

from triptych import config as c
from triptych import launch, options, single
from triptych.bench import config as b
from triptych.credentials import secrets_from_environment
from triptych.errors import ConfigError, TriptychError, UnsupportedModel
from triptych.eval.config import EvalConfig
from triptych.observe import log


def _command(name: str, kind: Any) -> Any:
    return Annotated[kind, tyro.conf.subcommand(name, prefix_name=False)]


COMMANDS: dict[str, type[Any]] = {
    "serve": c.ServeConfig,
    "router": c.RouterConfig,
    "encoder": c.EncoderConfig,
    "prefill": c.PrefillConfig,
    "decode": c.DecodeConfig,
    "language": c.LanguageConfig,
    "shared": c.SharedConfig,
    "demo": c.DemoConfig,
    "bench": b.BenchConfig,
    "eval": EvalConfig,
}
DESCRIPTION = "Serve vision-language models with Encode, Prefill and Decode apart."
EXIT_CONFIG = 2
"""Exit status for what only another command line or another model can mend."""
EXIT_INTERRUPTED = 130


def parse(arguments: Sequence[str]) -> Any:
    """The configuration that ``arguments`` ask for; exits with status 2 if they are wrong."""
    commands: Any = None
    for name, kind in COMMANDS.items():
        commands = _command(name, kind) if commands is None else commands | _command(name, kind)
    return tyro.cli(commands, prog="triptych", description=DESCRIPTION, args=arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    config = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        _leave(run(config))
    except TriptychError as error:
        print(f"error: {error.message}", file=sys.stderr)
        sys.exit(EXIT_CONFIG if isinstance(error, ConfigError | UnsupportedModel) else 1)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


BENCHES: dict[type[Any], str] = {
    b.BenchTransferConfig: "transfer",
    b.BenchPlotConfig: "plot",
    b.BenchServeConfig: "serve",
    b.BenchTopologiesConfig: "topologies",
    b.BenchCompareConfig: "compare",
}
"""The module of ``triptych.bench`` that measures it."""


def _bench(config: Any) -> int:
    done = importlib.import_module(f"triptych.bench.{BENCHES[type(config)]}").run(config)
    if not asyncio.iscoroutine(done):
        return int(done)
    # uvloop cannot start children in process groups of their own.
    starts = isinstance(config, b.BenchTopologiesConfig)
    return int(asyncio.run(done) if starts else uvloop.run(done))


def _leave(status: int) -> NoReturn:
    """End this process, which has cleaned up after itself.

    Where torch is loaded, the interpreter would spend a second or more on taking it apart.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(config: Any) -> int:
    """Do what ``config`` says, until it is done or asked to end. The exit status.

    Raises ConfigError and UnsupportedModel for what cannot start, other TriptychErrors for what
    could not go on.
    """
    options.check(config)
    if isinstance(config, c.DemoConfig):
        demo = importlib.import_module("triptych.demo.run")
        return int(asyncio.run(demo.run(config)))
    if isinstance(config, b.BenchConfig):
        return _bench(config.what)
    if isinstance(config, EvalConfig):
        evaluation = importlib.import_module("triptych.eval.run")
        return int(asyncio.run(evaluation.run(config)))
    if isinstance(config, c.ServeConfig):
        secrets = secrets_from_environment(make=True)
        if config.topology != "EPD":
            return asyncio.run(launch.serve(config, secrets))
        log.setup("EPD")
        launch.end_with_parent(config.parent_pipe)
        uvloop.run(single.serve(config, secrets))
        return 0
    role = next(name for name, kind in COMMANDS.items() if type(config) is kind)
    log.setup(role)
    network = config if isinstance(config, c.RouterConfig) else config.network
    launch.end_with_parent(network.parent_pipe)
    secrets = secrets_from_environment()
    shared = isinstance(config, c.SharedConfig)
    uvloop.run(single.share(config, secrets) if shared else single.run_role(role, config, secrets))
    return 0
