"""Models of real size without weights: what a hub model's folder has, but for its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from triptych.config import ModelConfig
from triptych.demo.corpus import WORDS
from triptych.demo.shapes import SHAPES, make_shape
from triptych.errors import ConfigError
from triptych.media.image import ImageHeader
from triptych.media.processor import Processor
from triptych.models import refusals
from triptych.models.identity import resolve_dtype

PARAMETERS = {"qwen2.5-vl-7b": 8_292_166_656, "qwen3-vl-8b": 8_767_123_696}
"""Of the models with these shapes, as their weight files have them."""
FULL_HD_ROWS = {"qwen2.5-vl-7b": 2691, "qwen3-vl-8b": 2040}


@pytest.fixture(scope="module", params=sorted(SHAPES))
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(shape: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shape(tmp_path_factory.mktemp("shape") / "model", shape)


def test_the_shape_is_that_of_the_real_model(folder: Path, shape: str) -> None:
    config = AutoConfig.from_pretrained(folder)
    refusals.check(config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[shape]
    on_gpu = ModelConfig(str(folder), device="cuda", load_format="dummy")
    assert resolve_dtype(on_gpu, config) == torch.bfloat16
    assert not list(folder.glob("*.safetensors"))


def test_every_token_has_a_text_and_every_word_of_the_corpus_is_one(folder: Path) -> None:
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    size = config.get_text_config().vocab_size
    assert len(tokenizer) == size
    texts = [tokenizer.decode([token]) for token in range(0, size - 16, 97)]
    assert all(texts) and len(set(texts)) > 0.99 * len(texts)
    words = WORDS.split()[:100]
    assert len(tokenizer(" " + " ".join(words))["input_ids"]) == len(words)
    ids = [getattr(config, name) for name in ("image_token_id", "video_token_id")]
    assert tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"]) == ids
    assert config.get_text_config().eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_an_image_has_as_many_rows_as_in_the_real_model(folder: Path, shape: str) -> None:
    processor = Processor(ModelConfig(str(folder), load_format="dummy"))
    assert processor.plan(ImageHeader(1920, 1080, "JPEG"), 1).rows == FULL_HD_ROWS[shape]


def test_an_unknown_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no shape 'x'; there are qwen2\.5-vl-7b"):
        make_shape(tmp_path, "x")
