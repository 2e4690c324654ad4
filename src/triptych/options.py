"""What an option may be where its type does not say so, and a configuration as a command line."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import tyro

from triptych.config import EngineConfig, Timeouts, TlsConfig
from triptych.errors import ConfigError


def check(config: Any, where: str = "") -> None:
    """Refuse what no field's type can refuse. Called once, before a role starts.

    ``config``: any dataclass of ``config.py``. Raises ConfigError naming the option.
    """
    for item in fields(config):
        value, name = getattr(config, item.name), f"{where}{item.name.replace('_', '-')}"
        if is_dataclass(value):
            check(value, f"{item.name}." if item.name in ("timeouts", "tls") else where)
        elif value is None:
            continue  # not given
        elif item.name in _AT_LEAST_ONE and value < 1:
            raise ConfigError(f"--{name} must be at least 1, not {value}")
        elif item.name == "port" and not 0 <= value <= 65535:
            raise ConfigError(f"--{name} must be between 0 and 65535, not {value}")
        elif item.name == "memory_fraction" and value > 1:
            raise ConfigError(f"--{name} must be 1 at most, not {value}")
        elif type(value) is int and value < 0 and item.name != "parent_pipe":
            raise ConfigError(f"--{name} must not be negative, but is {value}")
        elif type(value) is float and value <= 0:
            raise ConfigError(f"--{name} must be positive, not {value}")
    if isinstance(config, Timeouts):
        _check_timeouts(config)
    if isinstance(config, TlsConfig) and (config.certificate is None) != (config.key is None):
        raise ConfigError("--tls.certificate and --tls.key go together")
    if isinstance(config, EngineConfig) and config.pipeline_parallel != 1:
        raise ConfigError(
            f"--pipeline-parallel {config.pipeline_parallel}: pipeline parallel is not supported; "
            "--tensor-parallel spreads the heads of every layer over processes"
        )


def _check_timeouts(config: Timeouts) -> None:
    if config.lease <= config.transfer:
        raise ConfigError(
            f"--timeouts.lease ({config.lease} s) must be longer than --timeouts.transfer "
            f"({config.transfer} s): memory must stay leased while it may still be read"
        )
    if config.silence <= config.heartbeat:
        raise ConfigError(
            f"--timeouts.silence ({config.silence} s) must be longer than "
            f"--timeouts.heartbeat ({config.heartbeat} s)"
        )


_AT_LEAST_ONE = {
    "batch_patches", "block_size", "concurrency", "decodes", "encoders",
    "landing_mib", "languages", "max_body_mib", "max_bytes", "max_choices", "max_frame_pixels",
    "max_frames", "max_held_mib", "max_images", "max_pixels", "max_requests", "max_sequences",
    "max_tokens", "max_video_bytes", "max_videos", "pool_mib", "prefills",
    "queue_patches", "repeats", "requests", "tensor_parallel", "together",
}  # fmt: skip


def command_line(config: Any, prefix: str = "") -> list[str]:
    """The arguments from which the command line builds ``config`` again."""
    words: list[str] = []
    hints = get_type_hints(type(config), include_extras=True)
    for item in fields(config):
        value, marks = getattr(config, item.name), getattr(hints[item.name], "__metadata__", ())
        option = f"--{prefix}{item.name.replace('_', '-')}"
        if is_dataclass(value):
            inner = prefix if tyro.conf.OmitArgPrefixes in marks else f"{option[2:]}."
            words += command_line(value, inner)
        elif tyro.conf.Positional in marks:
            words.append(str(value))
        elif value == item.default:
            continue
        elif isinstance(value, bool):
            words.append(option if value else f"--{prefix}no-{option[2 + len(prefix) :]}")
        elif isinstance(value, tuple):
            words += [option, *map(str, value)]
        else:
            words += [option, str(value)]
    return words
