from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from triptych.config import (
    DecodeConfig,
    EncoderConfig,
    EngineConfig,
    ModelConfig,
    NetworkConfig,
    Secrets,
    ServeConfig,
    Timeouts,
)
from triptych.credentials import environment_of_children, secrets_from_environment
from triptych.errors import ConfigError
from triptych.options import check

MODEL = ModelConfig("some/model")
SECRET = "0123456789abcdef"


def test_defaults_pass() -> None:
    for kind in (EncoderConfig, DecodeConfig, ServeConfig):
        check(kind(MODEL))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (ServeConfig(MODEL, encoders=0), "--encoders"),
        (ServeConfig(MODEL, port=70_000), "--port"),
        (ServeConfig(MODEL, engine=EngineConfig(block_size=0)), "--block-size"),
        (ServeConfig(MODEL, engine=EngineConfig(threads=-1)), "--threads"),
        (ServeConfig(MODEL, engine=EngineConfig(tensor_parallel=0)), "--tensor-parallel"),
        (
            ServeConfig(MODEL, engine=EngineConfig(pipeline_parallel=2)),
            "--pipeline-parallel 2: pipeline parallel is not supported; --tensor-parallel",
        ),
        (ServeConfig(MODEL, start_timeout=0.0), "--start-timeout"),
        (DecodeConfig(replace(MODEL, memory_fraction=1.5)), "--memory-fraction"),
        (DecodeConfig(replace(MODEL, memory_fraction=0.0)), "--memory-fraction"),
        (EncoderConfig(MODEL, NetworkConfig(port=-1)), "--port"),
        (EncoderConfig(MODEL, timeouts=Timeouts(connect=-1.0)), "--timeouts.connect"),
        (EncoderConfig(MODEL, timeouts=Timeouts(lease=20.0, transfer=20.0)), "--timeouts.lease"),
        (EncoderConfig(MODEL, timeouts=Timeouts(silence=1.0)), "--timeouts.silence"),
    ],
)
def test_a_bad_value_is_refused_by_name(config: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check(config)


def test_secret_from_variable_wins_over_file(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("from-a-file-0123456789\n")
    from_file = secrets_from_environment({"TRIPTYCH_SECRET_FILE": str(path)})
    assert from_file == Secrets(b"from-a-file-0123456789")
    both = {"TRIPTYCH_SECRET_FILE": str(path), "TRIPTYCH_SECRET": SECRET, "TRIPTYCH_API_KEY": "k"}
    assert secrets_from_environment(both) == Secrets(SECRET.encode(), "k")


def test_no_short_or_unreadable_secret(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="TRIPTYCH_SECRET"):
        secrets_from_environment({})
    with pytest.raises(ConfigError, match="16 bytes"):
        secrets_from_environment({"TRIPTYCH_SECRET": "short"})
    with pytest.raises(ConfigError, match="TRIPTYCH_SECRET_FILE"):
        secrets_from_environment({"TRIPTYCH_SECRET_FILE": str(tmp_path / "absent")})


def test_a_made_secret_is_new_each_time_and_reaches_the_children() -> None:
    one, two = (secrets_from_environment({}, make=True) for _ in range(2))
    assert one.shared != two.shared
    child = secrets_from_environment(environment_of_children(one))
    assert child.shared == one.shared


def test_secrets_do_not_show() -> None:
    secrets = Secrets(SECRET.encode(), "an-api-key")
    assert SECRET not in repr(secrets)
    assert "an-api-key" not in repr(secrets)
