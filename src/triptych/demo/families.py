"""What the small models of the families are: sizes, tokens, chat templates, processors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

HIDDEN = 64
HEAD_DIM = 16
TEXT: Json = {
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
MROPE: Json = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [2, 3, 3],
}
TOWER: Json = {"hidden_size": 32, "intermediate_size": 64}

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
QWEN_SPECIAL = {
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}

# One macro per family writes a message's content; the frame around it is common to all of them.
CONTENT_IN_ORDER = """\
{%- macro content(message) -%}
  {%- if message.content is string -%}
    {{- message.content -}}
  {%- else -%}
    {%- for part in message.content -%}
      {%- if part.type == 'image' -%}
        {{- 'IMAGE' -}}
      {%- elif part.type == 'video' -%}
        {{- 'VIDEO' -}}
      {%- elif part.type == 'text' -%}
        {{- part.text -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
"""
CONTENT_IMAGES_FIRST = """\
{%- macro content(message) -%}
  {%- if message.content is string -%}
    {{- message.content -}}
  {%- else -%}
    {%- for part in message.content if part.type == 'image' -%}
      {{- 'IMAGE' -}}
    {%- endfor -%}
    {%- for part in message.content if part.type == 'video' -%}
      {{- 'VIDEO' -}}
    {%- endfor -%}
    {%- for part in message.content if part.type == 'text' -%}
      {{- '\\n' + part.text -}}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
"""
DEFAULT_SYSTEM = """\
{%- if messages[0].role != 'system' -%}
  {{- '<|im_start|>systemAFTER_ROLESYSTEM<|im_end|>AFTER_TURN' -}}
{%- endif -%}
"""
FRAME = """\
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + 'AFTER_ROLE' + content(message) + '<|im_end|>AFTER_TURN' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class Template:
    """How a family writes a conversation."""

    image: str
    video: str
    after_role: str = "\\n"
    after_turn: str = "\\n"
    system: str = ""
    """What stands in for a system message that is not given."""
    images_first: bool = False

    def render(self) -> str:
        content = CONTENT_IMAGES_FIRST if self.images_first else CONTENT_IN_ORDER
        content = content.replace("IMAGE", self.image).replace("VIDEO", self.video)
        frame = (DEFAULT_SYSTEM if self.system else "") + FRAME
        frame = frame.replace("AFTER_ROLE", self.after_role).replace("AFTER_TURN", self.after_turn)
        return content + frame.replace("SYSTEM", self.system)


@dataclass(frozen=True)
class Family:
    """What differs between the families."""

    template: Template
    special: dict[str, str]
    """Named special tokens of the processor: attribute of the tokenizer → token."""
    text: Json
    vision: Json
    outer: Json = field(default_factory=dict)
    """Further keys of the outer configuration."""
    token_ids: dict[str, str] = field(default_factory=dict)
    """Key of the outer configuration → the special token whose id it takes."""
    processor_class: str = ""
    image_processor: Json = field(default_factory=dict)
    video_processor: Json = field(default_factory=dict)
    processor: Json = field(default_factory=dict)


QWEN_TEMPLATE = Template(
    image="<|vision_start|><|image_pad|><|vision_end|>",
    video="<|vision_start|><|video_pad|><|vision_end|>",
)
QWEN_TOKEN_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
QWEN_TOWER: Json = {
    **TOWER,
    "depth": 4,
    "out_hidden_size": HIDDEN,
    "num_heads": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def _qwen_pixels(patch_size: int) -> Json:
    return {
        "size": {"shortest_edge": 56 * 56, "longest_edge": 448 * 448},
        "patch_size": patch_size,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }


FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Family(
        template=Template(
            image=QWEN_TEMPLATE.image,
            video=QWEN_TEMPLATE.video,
            system="You are a helpful assistant.",
        ),
        special=QWEN_SPECIAL,
        text={**TEXT, "rope_parameters": MROPE},
        vision={
            **QWEN_TOWER,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 2,
        },
        token_ids=QWEN_TOKEN_IDS,
        processor_class="Qwen2_5_VLProcessor",
        image_processor={"image_processor_type": "Qwen2VLImageProcessor", **_qwen_pixels(14)},
        video_processor={"video_processor_type": "Qwen2VLVideoProcessor", **_qwen_pixels(14)},
    ),
    "qwen3_vl": Family(
        template=QWEN_TEMPLATE,
        special=QWEN_SPECIAL,
        text={**TEXT, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        vision={
            **QWEN_TOWER,
            "patch_size": 16,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        token_ids=QWEN_TOKEN_IDS,
        processor_class="Qwen3VLProcessor",
        image_processor={
            "image_processor_type": "Qwen2VLImageProcessor",
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            **_qwen_pixels(16),
        },
        video_processor={"video_processor_type": "Qwen3VLVideoProcessor", **_qwen_pixels(16)},
    ),
    "llava_onevision": Family(
        template=Template(
            image="<image>", video="<video>", after_role=" ", after_turn="", images_first=True
        ),
        special={"image_token": "<image>", "video_token": "<video>"},
        text={**TEXT, "model_type": "qwen2"},
        vision={
            **TOWER,
            "model_type": "siglip_vision_model",
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 84,
            "patch_size": 14,
            "vision_use_head": False,
        },
        outer={
            "image_grid_pinpoints": [[84, 168], [168, 84], [168, 168], [84, 252], [252, 84]],
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        },
        token_ids={"image_token_index": "<image>", "video_token_index": "<video>"},
        processor_class="LlavaOnevisionProcessor",
        image_processor={
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": {"height": 84, "width": 84},
            "image_grid_pinpoints": [[84, 168], [168, 84], [168, 168], [84, 252], [252, 84]],
        },
        video_processor={
            "video_processor_type": "LlavaOnevisionVideoProcessor",
            "size": {"height": 84, "width": 84},
        },
        processor={
            "num_image_tokens": 36,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
            "image_token": "<image>",
            "video_token": "<video>",
        },
    ),
    "internvl": Family(
        template=Template(image="<IMG_CONTEXT>\\n", video="<video>\\n"),
        special={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        text={**TEXT, "model_type": "qwen2"},
        vision={
            **TOWER,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [112, 112],
            "patch_size": [14, 14],
        },
        outer={"downsample_ratio": 0.5, "image_seq_length": 16},
        token_ids={"image_token_id": "<IMG_CONTEXT>"},
        processor_class="InternVLProcessor",
        image_processor={
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": {"height": 112, "width": 112},
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": 4,
        },
        video_processor={
            "video_processor_type": "InternVLVideoProcessor",
            "size": {"height": 112, "width": 112},
        },
        processor={"image_seq_length": 16},
    ),
}
