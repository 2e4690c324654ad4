"""Models of real size without weights: configuration, processor and a tokenizer of as many tokens.

``triptych serve FOLDER --load-format dummy`` runs such a folder with random weights: what an answer
costs is that of the real model, what it says is noise. Nothing is downloaded.

``python -m triptych.demo.shapes FOLDER --shape qwen2.5-vl-7b``
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from transformers import AutoConfig, GenerationConfig

from triptych.demo.families import FAMILIES
from triptych.demo.family import END, PAD
from triptych.demo.tiny import make_tokenizer, write_processor
from triptych.errors import ConfigError

Json = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """What a model's own configuration says of its size."""

    family: str
    text: Json
    vision: Json
    pixels: tuple[int, int]
    """Fewest and most of an image, as its processor sets them."""


SHAPES: dict[str, Shape] = {
    "qwen2.5-vl-7b": Shape(
        family="qwen2_5_vl",
        text={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
        },
        vision={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
        },
        pixels=(56 * 56, 12_845_056),
    ),
    "qwen3-vl-8b": Shape(
        family="qwen3_vl",
        text={
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        vision={
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": 4096,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        pixels=(65_536, 16_777_216),
    ),
}


def make_shape(folder: tyro.conf.Positional[Path], shape: str = "qwen2.5-vl-7b") -> Path:
    """Write ``shape``, a key of ``SHAPES``, into ``folder`` and return ``folder``.

    Raises ConfigError for an unknown one.
    """
    if shape not in SHAPES:
        raise ConfigError(f"no shape {shape!r}; there are {', '.join(SHAPES)}")
    given = SHAPES[shape]
    spec = FAMILIES[given.family]
    folder.mkdir(parents=True, exist_ok=True)
    size, longest = given.text["vocab_size"], given.text["max_position_embeddings"]
    known = len(make_tokenizer(spec))
    tokenizer = make_tokenizer(spec, size - known, longest)
    tokenizer.save_pretrained(folder)
    end, pad = tokenizer.convert_tokens_to_ids([END, PAD])
    AutoConfig.for_model(
        given.family,
        text_config={
            **given.text,
            "bos_token_id": None,
            "eos_token_id": end,
            "pad_token_id": pad,
            "tie_word_embeddings": False,
        },
        vision_config=given.vision,
        tie_word_embeddings=False,
        dtype="bfloat16",
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in spec.token_ids.items()},
    ).save_pretrained(folder)
    GenerationConfig(do_sample=False, eos_token_id=[end, pad], pad_token_id=pad).save_pretrained(
        folder
    )
    write_processor(folder, spec)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        settings = json.loads((folder / name).read_text("utf-8"))
        settings["size"] = dict(zip(("shortest_edge", "longest_edge"), given.pixels, strict=True))
        (folder / name).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    return folder


def main() -> None:
    print(tyro.cli(make_shape, description=__doc__))


if __name__ == "__main__":
    main()
