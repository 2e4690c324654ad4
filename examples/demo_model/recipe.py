"""The demo model before training: its sizes, tokenizer, chat template and image processor.

Everything is standard Qwen3-VL, only small: DeepStack, M-RoPE and dynamic resolution included.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from triptych.demo.family import END, PAD, START
from triptych.demo.grid_families import QWEN_SPECIAL, QWEN_TOKEN_IDS
from triptych.demo.tasks.samples import MOST_PICTURES, MOST_TILES, make_sample
from triptych.demo.tasks.scenes import COLOURS, SHAPES, WORDS

PATCH = 16
MERGE = 2
TILE = PATCH * MERGE
"""Side of the square of pixels that becomes one image token."""
FEWEST_TILES = 9
TILES = max(MOST_TILES.values())
"""Most image tokens of one picture."""

WIDTH = 192
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 448,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "initializer_range": 0.04,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    },
}
VISION: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "depth": 6,
    "num_heads": 4,
    "out_hidden_size": WIDTH,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
    "num_position_embeddings": 256,
    "deepstack_visual_indexes": [1, 3],
    "initializer_range": 0.04,
}
CHAT_TEMPLATE = """\
{%- set seen = namespace(pictures=0) -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\\n' -}}
  {%- if message.content is string -%}
    {{- message.content -}}
  {%- else -%}
    {%- for part in message.content -%}
      {%- if part.type == 'image' -%}
        {%- set seen.pictures = seen.pictures + 1 -%}
        {{- 'Picture ' ~ seen.pictures ~ ':<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- elif part.type == 'text' -%}
        {{- part.text -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
PIECES = Regex(" ?[A-Za-z]+| ?[0-9]|[^A-Za-z0-9]")
"""What a token never reaches beyond: a word, a digit, any other single character."""
VOCABULARY = 2048
"""Most pieces of the tokenizer; the words of the questions need fewer."""
CORPUS_SAMPLES = 2000
AIDS = ("describe", "describe one of several")
"""Question types that are there to teach the vision tower: not in the two accuracies."""


def make_tokenizer(saved: str = "") -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of the questions is one token and every digit is one.

    ``saved``: the pieces of an earlier one, as ``pieces`` gave them; else they are found anew.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(saved) if saved else _train_pieces(),
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=QWEN_SPECIAL,
        model_max_length=TEXT["max_position_embeddings"],
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [START]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def pieces(tokenizer: PreTrainedTokenizerFast) -> str:
    """All of the tokenizer that was learned, as JSON."""
    return str(tokenizer.backend_tokenizer.to_str())


def _train_pieces() -> Tokenizer:
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(PIECES, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(), trainer)
    return bpe


def _corpus() -> Iterator[str]:
    words = [*COLOURS, *SHAPES, *WORDS]
    yield from (f"{word} {word}" for word in words)
    yield from ("system\n", "user\n", "assistant\n", "Picture 1:", *(f"{n} {n}" for n in range(10)))
    for index in range(CORPUS_SAMPLES):
        sample = make_sample("train", index, 1 + index % MOST_PICTURES, 8)
        for question in sample.questions:
            yield question.text
            yield question.answer


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Any:
    """The untrained model, float32 on the CPU, in training mode."""
    end, pad = tokenizer.convert_tokens_to_ids([END, PAD])
    ids = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": pad}
    config = AutoConfig.for_model(
        "qwen3_vl",
        text_config={**TEXT, **ids, "vocab_size": len(tokenizer)},
        vision_config=VISION,
        tie_word_embeddings=True,
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in QWEN_TOKEN_IDS.items()},
    )
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=[end, pad], pad_token_id=pad
    )
    return model.train()


def write_processor(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Everything of a checkpoint but its configuration and weights."""
    tokenizer.save_pretrained(folder)
    sizes = {
        "size": {"shortest_edge": FEWEST_TILES * TILE**2, "longest_edge": TILES * TILE**2},
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    files: dict[str, dict[str, Any]] = {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor", **sizes},
        "video_preprocessor_config.json": {
            "video_processor_type": "Qwen3VLVideoProcessor",
            **sizes,
        },
        "processor_config.json": {},
    }
    for name, content in files.items():
        text = json.dumps({**content, "processor_class": "Qwen3VLProcessor"}, indent=2)
        (folder / name).write_text(text + "\n", "utf-8")


def write_model(folder: Path, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """A complete checkpoint, its weights rounded to float16."""
    folder.mkdir(parents=True, exist_ok=True)
    write_processor(folder, tokenizer)
    half = AutoModelForImageTextToText.from_config(model.config, dtype=torch.float16)
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    half.save_pretrained(folder)
