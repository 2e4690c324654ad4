"""A complete, small vision-language model with random weights, made here: nothing is downloaded.

The folder is what a hub model's folder is (configuration, safetensors, tokenizer, chat template,
image processor), so everything that loads those loads this. Its answers mean nothing, but they are
English words, they vary, and they depend on every image.

``python -m triptych.demo.tiny FOLDER --family qwen3_vl``
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import tyro
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from triptych.demo.corpus import WORDS
from triptych.demo.families import FAMILIES
from triptych.demo.family import END, PAD, START, TEXT, Family
from triptych.errors import ConfigError
from triptych.models.dummy import fill_random
from triptych.models.quiet import quiet

__all__ = ["FAMILIES", "make_tiny_model"]

VOCABULARY = 2048
"""Most pieces of the tokenizer, special tokens not counted."""
PIECE_SCALE = 0.5
"""Head rows of pieces that are not whole words, against 1 for words: answers read as words."""


def make_tiny_model(
    folder: tyro.conf.Positional[Path], family: str = "qwen3_vl", seed: int = 0
) -> Path:
    """Write a model of ``family``, a key of ``FAMILIES``, into ``folder`` and return ``folder``.

    Equal arguments give equal weights. Raises ConfigError for an unknown family.
    """
    if family not in FAMILIES:
        raise ConfigError(f"no small model of family {family!r}; there are {', '.join(FAMILIES)}")
    spec = FAMILIES[family]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(spec)
    tokenizer.save_pretrained(folder)
    write_processor(folder, spec)

    config = _config(family, spec, tokenizer)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    fill_random(model, seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(_head_scale(tokenizer)[:, None])
    stops = tokenizer.convert_tokens_to_ids([END, PAD])
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=stops, pad_token_id=stops[1]
    )
    with quiet():
        model.save_pretrained(folder)
    return folder


def _config(family: str, spec: Family, tokenizer: PreTrainedTokenizerFast) -> Any:
    end, pad = tokenizer.convert_tokens_to_ids([END, PAD])
    ids = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": pad}
    return AutoConfig.for_model(
        spec.model_type or family,
        text_config={**spec.text, **ids, "vocab_size": len(tokenizer)},
        vision_config=spec.vision,
        tie_word_embeddings=False,
        **spec.outer,
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in spec.token_ids.items()},
    )


def make_tokenizer(
    spec: Family, more: int = 0, max_length: int = TEXT["max_position_embeddings"]
) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of the corpus is one piece. ``more`` pieces besides stand
    for what a larger vocabulary has: numbers that no text is cut into."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = WORDS.split()
    bpe.train_from_iterator([" ".join(["", *words]), "system user assistant \n"], trainer)
    if more:
        bpe = _enlarged(bpe, more)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=spec.special,
        model_max_length=max_length,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [START, *spec.tokens]})
    tokenizer.chat_template = spec.template.render()
    return tokenizer


def _enlarged(bpe: Tokenizer, more: int) -> Tokenizer:
    settings = json.loads(bpe.to_str())
    vocabulary = settings["model"]["vocab"]
    first = len(vocabulary)
    vocabulary |= {f"Ġ{number:06}": number for number in range(first, first + more)}
    return Tokenizer.from_str(json.dumps(settings))


def _head_scale(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """(vocabulary,) factor of each head row; 0 for what an answer should never contain."""
    scale = torch.zeros(len(tokenizer))
    words = {f" {word}" for word in WORDS.split()}
    for index in range(len(tokenizer)):
        text = tokenizer.decode([index])
        if index == tokenizer.eos_token_id:
            scale[index] = 1.0
        elif index not in tokenizer.all_special_ids and text.isascii() and text.isprintable():
            scale[index] = 1.0 if text in words else PIECE_SCALE
    return scale


def write_processor(folder: Path, spec: Family) -> None:
    name = {"processor_class": spec.processor_class}
    files = {
        "preprocessor_config.json": spec.image_processor,
        "video_preprocessor_config.json": spec.video_processor,
        "processor_config.json": spec.processor,
    }
    for file, content in files.items():
        if not content and file.startswith("video"):
            continue  # it takes none
        (folder / file).write_text(json.dumps({**content, **name}, indent=2) + "\n", "utf-8")


def main() -> None:
    print(tyro.cli(make_tiny_model, description=__doc__))


if __name__ == "__main__":
    main()
