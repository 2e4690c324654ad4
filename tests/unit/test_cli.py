from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from triptych import cli
from triptych.config import (
    DecodeConfig,
    DemoConfig,
    EncoderConfig,
    EngineConfig,
    LandingConfig,
    LanguageConfig,
    MediaLimits,
    ModelConfig,
    NetworkConfig,
    PrefillConfig,
    RouterConfig,
    ServeConfig,
    SharedConfig,
    Timeouts,
)
from triptych.errors import TriptychError, UnsupportedModel, WorkerLost
from triptych.options import command_line

MODEL = ModelConfig("a/b", dtype="bfloat16", device="cuda:1", load_format="dummy", revision="v1")
NETWORK = NetworkConfig("http://r:1", "0.0.0.0", 7, "me", "http", 5)
ENGINE = EngineConfig(1, 2, 3, 4, 5, 6, selftest=False)
LANDING = LandingConfig(9)
TIMEOUTS = Timeouts(connect=1.5, lease=99.0)


@pytest.mark.parametrize(
    ("command", "config"),
    [
        ("serve", ServeConfig(ModelConfig("m"))),
        (
            "serve",
            ServeConfig(
                MODEL,
                "EPD",
                *(2, 3, 4, 5),
                host="::1",
                port=8,
                transport="shm",
                engine=ENGINE,
                landing=LANDING,
                pool_mib=10,
                allow_private_media=True,
                allowed_media_root=Path("/m"),
            ),
        ),
        ("router", RouterConfig(MODEL, served_name="x y", allow_private_media=True)),
        ("router", RouterConfig(MODEL, limits=MediaLimits(1, 2, 3), timeouts=TIMEOUTS)),
        ("encoder", EncoderConfig(MODEL, NETWORK, MediaLimits(4, 5, 6), TIMEOUTS, 7, 8, 9, 10, 11)),
        ("encoder", EncoderConfig(replace(MODEL, compile=False, compile_cache=Path("/c")))),
        ("serve", ServeConfig(replace(MODEL, compile=False))),
        ("prefill", PrefillConfig(MODEL, NETWORK, ENGINE, LANDING, TIMEOUTS)),
        ("decode", DecodeConfig(MODEL, NETWORK, ENGINE, TIMEOUTS)),
        ("language", LanguageConfig(MODEL, NETWORK, ENGINE, LANDING, TIMEOUTS)),
        (
            "shared",
            SharedConfig(MODEL, NETWORK, MediaLimits(4), ENGINE, LANDING, TIMEOUTS, *(7, 8, 9, 10)),
        ),
    ],
)
def test_a_configuration_comes_back_from_its_command_line(command: str, config: Any) -> None:
    assert cli.parse([command, *command_line(config)]) == config


def test_what_users_type() -> None:
    typed = "serve /models/x --topology E/PD --encoders 2 --port 9000 --load-format dummy"
    wanted = ServeConfig(
        ModelConfig("/models/x", load_format="dummy"), topology="E/PD", encoders=2, port=9000
    )
    assert cli.parse(typed.split()) == wanted
    demo = cli.parse(["demo", "--images", "a b.png", "c.jpg", "--prompt", "What is it?"])
    assert demo == replace(
        DemoConfig(), images=(Path("a b.png"), Path("c.jpg")), prompt="What is it?"
    )


@pytest.mark.parametrize(
    "typed",
    ["", "serve", "fly m", "serve m --wings 2", "serve m --port x", "encoder m --dtype float31"],
)
def test_what_is_not_understood_ends_with_status_2(
    typed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(typed.split())
    assert end.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"), [(UnsupportedModel("heads differ"), 2), (WorkerLost("gone"), 1)]
)
def test_an_error_is_one_line(
    error: TriptychError,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(config: Any) -> int:
        raise error

    monkeypatch.setattr(cli, "run", fail)
    with pytest.raises(SystemExit) as end:
        cli.main(["decode", "m"])
    assert end.value.code == status
    assert capsys.readouterr().err == f"error: {error.message}\n"


def test_a_role_without_a_secret_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRIPTYCH_SECRET", raising=False)
    monkeypatch.delenv("TRIPTYCH_SECRET_FILE", raising=False)
    with pytest.raises(SystemExit) as end:
        cli.main(["decode", "m", "--parent-pipe", "-1"])
    assert end.value.code == 2
    assert "TRIPTYCH_SECRET" in capsys.readouterr().err


def test_help_loads_no_torch() -> None:
    script = (
        "import sys\nfrom triptych import cli\n"
        "try: cli.main(['serve', '--help'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(sorted({'torch', 'transformers', 'uvicorn'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--topology" in done.stdout
