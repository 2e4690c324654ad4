"""Two ranks on two GPUs, by NCCL: the CPU's answers in float32, and the plain model's logits in
bfloat16 by the kernels, the compiled layers and the captured steps of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLConfig

from tests.end_to_end.engine_driver import GREEDY, Driver
from tests.end_to_end.ranked import PATIENT, Group, RankedFamily
from triptych.config import MIB, EngineConfig, ModelConfig
from triptych.engine.backends import compile_layers
from triptych.engine.messages import AddRequest
from triptych.engine.selftest import selftest
from triptych.models.loading import load_language
from triptych.stage.ranks import OpenPool

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
DEVICE = "cuda:0"


@pytest.fixture
def family(tmp_path: Path) -> Iterator[RankedFamily]:
    ranked = RankedFamily(tmp_path, "qwen3_vl", DEVICE)
    yield ranked
    ranked.close()


def test_float32_equals_the_cpu(family: RankedFamily) -> None:
    cases = [family.case("text", 0), family.case("one", 1), family.case("three", 3, n_text=20)]
    with family.lead(chunk_tokens=24) as driver:
        driver.finish(*(driver.add(case) for case in cases))
        assert driver.failed == {}
        assert all(driver.answer(case.name) == case.answer for case in cases)
        assert driver.is_empty()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    text = {
        "hidden_size": 1024,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 512,
        "vocab_size": 1023,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [16, 24, 24]},
    }
    vision = {"depth": 1, "hidden_size": 64, "out_hidden_size": 1024, "num_heads": 2}
    tokens = {"image_token_id": 1000, "video_token_id": 1001, "vision_start_token_id": 1002}
    Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens).save_pretrained(tmp_path)
    return tmp_path


def test_bfloat16_compiled_and_captured(folder: Path) -> None:
    """The self-test compares the kernels with the plain model; then captured steps of one sequence
    and of eight meet their counterparts on the other rank."""
    pytest.importorskip("flashinfer")
    settings = EngineConfig(kv_mib=1, threads=1, tensor_parallel=2, max_sequences=8)
    config = ModelConfig(str(folder), "bfloat16", DEVICE, "dummy", compile_cache=folder / "code")
    group = Group("language", config, settings, PATIENT)
    try:
        group.join()
        model = load_language(config, group)
        compile_layers(model, settings, config)
        selftest(model, settings)
        group.open_pools(OpenPool("nonce", MIB, None, ""))
        with Driver(model, group, max_sequences=8) as driver:
            for names in (["alone"], [str(i) for i in range(8)]):
                for name in names:
                    driver.engine.submit(AddRequest(name, (5, 6, 7), (), GREEDY))
                driver.finish(*names)
                assert driver.failed == {}
                answers = [driver.answer(name) for name in names]
                assert all(len(answer) == GREEDY.max_tokens for answer in answers)
                assert all(token < 1023 for answer in answers for token in answer), "no filled row"
            assert driver.engine._runner.graphs is not None
        assert driver.engine._runner.graphs is None, "what is captured would outlive the group"
    finally:
        group.close()
