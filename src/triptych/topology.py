"""Which processes make a topology, each with its configuration and its command line. Pure."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from triptych.config import (
    DecodeConfig,
    EncoderConfig,
    LanguageConfig,
    NetworkConfig,
    PrefillConfig,
    RouterConfig,
    ServeConfig,
    SharedConfig,
)
from triptych.options import command_line


@dataclass(frozen=True)
class Command:
    """One child: its name in messages and of its log, and the program with its arguments."""

    name: str
    argv: tuple[str, ...]


def role_configs(config: ServeConfig) -> dict[str, list[Any]]:
    """The configurations of every process of the topology, by role, router first."""
    if config.topology == "EPD":
        config = replace(config, encoders=1, languages=1)
    if config.topology == "E+PD":
        config = replace(config, encoders=config.languages)
    router = RouterConfig(
        model=config.model,
        host=config.host,
        port=config.port,
        topology="E/PD" if config.topology == "E+PD" else config.topology,
        encoders=config.encoders,
        prefills=config.prefills,
        decodes=config.decodes,
        languages=config.languages,
        tls=config.tls,
        allowed_media_root=config.allowed_media_root,
        allow_private_media=config.allow_private_media,
        parent_pipe=config.parent_pipe,
    )
    network = NetworkConfig(
        router=router_url(config), transport=config.transport, parent_pipe=config.parent_pipe
    )
    workers = {role: _placed(*each) for role, each in _workers(config, network).items()}
    return {"router": [router], **workers}


def _workers(
    config: ServeConfig, network: NetworkConfig
) -> dict[str, tuple[Any, Sequence[str], int]]:
    """By role: what one is given, the devices in turn, and how many there are."""
    model, engine, landing = config.model, config.engine, config.landing
    sizes: dict[str, Any] = {
        "pool_mib": config.pool_mib,
        "batch_patches": config.batch_patches,
        "media_threads": config.media_threads,
    }
    language = (config.language_devices, config.languages)
    if config.topology == "E+PD":
        shared = SharedConfig(model, network, engine=engine, landing=landing, **sizes)
        return {"shared": (shared, *language)}
    encoder = EncoderConfig(model, network, threads=engine.threads, **sizes)
    encoders = {"encoder": (encoder, config.encoder_devices, config.encoders)}
    if config.topology != "E/P/D":
        return encoders | {"language": (LanguageConfig(model, network, engine, landing), *language)}
    prefill = PrefillConfig(model, network, engine, landing)
    decode = DecodeConfig(model, network, engine)
    return encoders | {
        "prefill": (prefill, config.prefill_devices, config.prefills),
        "decode": (decode, config.decode_devices, config.decodes),
    }


def _placed(worker: Any, devices: Sequence[str], count: int) -> list[Any]:
    """``count`` of ``worker``, on ``devices`` in turn; without any, where its model is."""
    names = itertools.islice(itertools.cycle(devices or (worker.model.device,)), count)
    return [replace(worker, model=replace(worker.model, device=name)) for name in names]


def commands(config: ServeConfig) -> list[Command]:
    """The children of a topology, router first. EPD is one child."""
    program = (sys.executable, "-m", "triptych")
    if config.topology == "EPD":
        return [Command("epd", (*program, "serve", *command_line(config)))]
    return [
        Command(role if len(each) == 1 else f"{role}-{index}", (*program, role, *command_line(one)))
        for role, each in role_configs(config).items()
        for index, one in enumerate(each)
    ]


def router_url(config: ServeConfig) -> str:
    """Where processes on this machine reach the router."""
    host = "127.0.0.1" if config.host in ("0.0.0.0", "localhost") else config.host
    host = "::1" if host == "::" else host
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"
