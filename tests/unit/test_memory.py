"""Sizing the KV cache; what a GPU's share leaves is measured in ``tests/gpu/test_memory.py``."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from triptych.config import MIB, EngineConfig
from triptych.engine.memory import kv_nbytes
from triptych.errors import ConfigError

from .conftest import TinyModel


def test_what_is_configured_is_taken(tiny_models: Callable[[str], TinyModel]) -> None:
    model = tiny_models("qwen3_vl").language
    assert kv_nbytes(model, EngineConfig(kv_mib=3), 0.5, 7 * MIB) == 3 * MIB


def test_a_share_of_host_memory_is_refused_by_name(tiny_models: Callable[[str], TinyModel]) -> None:
    model = tiny_models("qwen3_vl").language
    with pytest.raises(ConfigError, match="--kv-mib 0 needs a GPU"):
        kv_nbytes(model, EngineConfig(kv_mib=0), 0.5, 0)
