"""The small model: a complete folder, readable and varied answers, answers that see the images."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from tests.unit.conftest import TinyModel, picture
from triptych.demo.corpus import WORDS
from triptych.demo.tiny import FAMILIES, make_tiny_model
from triptych.errors import ConfigError

VIDEO = ("video_preprocessor_config.json",)
IMAGE_TEXT = {
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": "<IMG_CONTEXT>\n",
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl_moe": "<|vision_start|><|image_pad|><|vision_end|>",
    "glm4v": "<|begin_of_image|><|image|><|end_of_image|>",
    "glm4v_moe": "<|begin_of_image|><|image|><|end_of_image|>",
    "idefics3": "<image>",
    "smolvlm": "<image>",
    "llava": "<image>\n",
    "llava_next": "<image>\n",
    "mistral3": "[IMG]",
    "pixtral": "[IMG]",
    "gemma3": "<start_of_image>",
}


def answer(tiny: TinyModel, inputs: dict[str, Tensor], n: int = 24) -> tuple[list[int], Tensor]:
    """Greedy tokens, and the logits of the first."""
    out = tiny.whole.generate(
        **inputs, max_new_tokens=n, output_logits=True, return_dict_in_generate=True
    )
    return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), out.logits[0][0]


def test_folder_is_complete_and_small(tiny: TinyModel) -> None:
    files = {path.name: path.stat().st_size for path in tiny.folder.iterdir()}
    assert sum(files.values()) < 8 << 20
    assert set(files) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "processor_config.json",
        "preprocessor_config.json", *(VIDEO if FAMILIES[tiny.family].video_processor else ()),
    }  # fmt: skip
    config = AutoConfig.from_pretrained(tiny.folder)
    assert config.model_type == (FAMILIES[tiny.family].model_type or tiny.family)
    text = config.get_text_config()
    assert text.num_key_value_heads < text.num_attention_heads
    assert not config.tie_word_embeddings
    assert not torch.equal(tiny.whole.lm_head.weight, tiny.whole.get_input_embeddings().weight)
    generation = json.loads((tiny.folder / "generation_config.json").read_text())
    assert generation.pop("transformers_version")
    assert set(generation) == {"do_sample", "eos_token_id", "pad_token_id"}


def test_equal_arguments_make_equal_folders(tiny: TinyModel, tmp_path: Path) -> None:
    again = make_tiny_model(tmp_path / "again", tiny.family)
    other = make_tiny_model(tmp_path / "other", tiny.family, seed=1)
    for path in tiny.folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name
    name = "model.safetensors"
    assert (other / name).read_bytes() != (again / name).read_bytes()


def test_chat_template(tiny: TinyModel) -> None:
    conversation = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "why"},
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder)

    def render(messages: object, generation: bool = True) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation
            )
        )

    if tiny.family == "llava_onevision":
        first = (
            "<|im_start|>system be brief<|im_end|><|im_start|>user <image>\nwhat<|im_end|>"
            "<|im_start|>assistant a cat<|im_end|><|im_start|>user why<|im_end|>"
        )
    else:
        first = (
            "<|im_start|>system\nbe brief<|im_end|>\n"
            f"<|im_start|>user\n{IMAGE_TEXT[tiny.family]}what<|im_end|>\n"
            "<|im_start|>assistant\na cat<|im_end|>\n<|im_start|>user\nwhy<|im_end|>\n"
        )
    assert render(conversation, generation=False) == first
    assert render(conversation) == first + "<|im_start|>assistant\n"
    default = "You are a helpful assistant."
    assert (default in render(conversation[1:])) == (tiny.family in ("qwen2_vl", "qwen2_5_vl"))
    assert default not in render(conversation)


def test_special_tokens_are_single_tokens(tiny: TinyModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder)
    ids = tokenizer("<|im_start|>user\nwhat is this<|im_end|>", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "<|im_start|>"
    assert ids[-1] == tokenizer.eos_token_id
    image_id = AutoConfig.from_pretrained(tiny.folder).image_token_id
    assert image_id in tokenizer.all_special_ids
    text = "Grüße, 世界 \N{GRINNING FACE}!\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_answers_are_words_and_vary(tiny: TinyModel) -> None:
    tokenizer = tiny.processor.hf.tokenizer
    images = [picture(1), picture(2, 90, 200), picture(3)]
    answers = [answer(tiny, tiny.inputs(images[:n]))[0] for n in range(4)]
    tokens = [token for tokens in answers for token in tokens]
    assert len(set(tokens)) > len(tokens) / 3
    words = set(WORDS.split())
    known = sum(tokenizer.decode([token]).strip() in words for token in tokens)
    assert known > 0.8 * len(tokens)
    assert "\N{REPLACEMENT CHARACTER}" not in tokenizer.decode(tokens)


def test_answers_depend_on_every_image(tiny: TinyModel) -> None:
    images = [picture(1), picture(2), picture(3)]
    tokens, logits = answer(tiny, tiny.inputs(images))
    for changed in range(3):
        others = [picture(9) if i == changed else image for i, image in enumerate(images)]
        other_tokens, other_logits = answer(tiny, tiny.inputs(others))
        assert (logits - other_logits).abs().max() > 0.1
        assert tokens != other_tokens
    swapped, _ = answer(tiny, tiny.inputs(images[::-1]))
    assert swapped != tokens


def test_command_line(tmp_path: Path, tiny_models: Callable[[str], TinyModel]) -> None:
    folder = tmp_path / "made"
    command = [sys.executable, "-m", "triptych.demo.tiny", str(folder), "--family", "internvl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == str(folder)
    weights = tiny_models("internvl").folder / "model.safetensors"
    assert (folder / "model.safetensors").read_bytes() == weights.read_bytes()


def test_unknown_family(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gpt2.*qwen2_5_vl"):
        make_tiny_model(tmp_path, "gpt2")
