"""Secrets come from the environment or from files, never from a command line."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from triptych.config import Secrets
from triptych.errors import ConfigError


def secrets_from_environment(
    environ: Mapping[str, str] | None = None, *, make: bool = False
) -> Secrets:
    """``TRIPTYCH_SECRET`` or the file ``TRIPTYCH_SECRET_FILE``; ``TRIPTYCH_API_KEY`` and
    ``TRIPTYCH_OPERATOR_KEY`` likewise.

    ``make``: with no shared secret given, make one (for children of this process).
    Raises ConfigError when there is none, or one shorter than 16 bytes.
    """
    env = os.environ if environ is None else environ
    shared = _secret(env, "TRIPTYCH_SECRET")
    if shared is None and make:
        shared = secrets.token_hex(32)
    if shared is None:
        raise ConfigError(
            "no shared secret: set TRIPTYCH_SECRET or TRIPTYCH_SECRET_FILE "
            "to the same value (16 bytes or more) for every role"
        )
    if len(shared.encode()) < 16:
        raise ConfigError("the shared secret is shorter than 16 bytes")
    return Secrets(
        shared=shared.encode(),
        api_key=_secret(env, "TRIPTYCH_API_KEY"),
        operator_key=_secret(env, "TRIPTYCH_OPERATOR_KEY"),
    )


def environment_of_children(shared: Secrets) -> dict[str, str]:
    """This process's environment, with the shared secret in it."""
    return {**os.environ, "TRIPTYCH_SECRET": shared.shared.decode()}


def _secret(env: Mapping[str, str], name: str) -> str | None:
    if name in env:
        return env[name]
    path = env.get(f"{name}_FILE")
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError as exc:
        raise ConfigError(f"{name}_FILE: {exc}") from exc
