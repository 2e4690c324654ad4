"""A share of a GPU's memory: what the KV cache is given of it, and that the share is kept."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from triptych.config import MIB, EngineConfig, ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.engine.loop import Engine
from triptych.engine.memory import MARGIN_NBYTES, kv_nbytes, step_nbytes
from triptych.errors import ConfigError
from triptych.models.language import LanguageModel
from triptych.models.loading import load_language

SHARE = 0.2
LANDING_NBYTES = 64 * MIB


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LanguageModel]:
    folder = make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", "qwen3_vl")
    config = ModelConfig(str(folder), "bfloat16", "cuda:0", memory_fraction=SHARE, compile=False)
    yield load_language(config)
    torch.cuda.set_per_process_memory_fraction(1.0, 0)


def test_the_cache_takes_what_the_share_leaves(model: LanguageModel) -> None:
    config = EngineConfig(kv_mib=0, chunk_tokens=256, attention="sdpa")
    total = torch.cuda.get_device_properties(0).total_memory
    step = step_nbytes(model, config)
    assert 0 < step < total // 100
    nbytes = kv_nbytes(model, config, SHARE, LANDING_NBYTES)
    spare = SHARE * total - nbytes - LANDING_NBYTES - torch.cuda.memory_reserved(0)
    assert MARGIN_NBYTES <= spare <= MARGIN_NBYTES + 2 * step + 2 * MIB
    memory = torch.zeros(nbytes, dtype=torch.uint8, device="cuda:0")
    engine = Engine(model, memory, config, lambda output: None)
    engine.start().result(60)
    engine.close(10)


def test_the_share_is_kept(model: LanguageModel) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(int(1.1 * SHARE * total), dtype=torch.uint8, device="cuda:0")


def test_a_share_too_small_is_refused_with_its_parts(model: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="leaves nothing for the KV cache"):
        kv_nbytes(model, EngineConfig(kv_mib=0, attention="sdpa"), 0.001, 0)
