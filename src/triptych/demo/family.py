"""What the description of a small model consists of: sizes, tokens, chat template, processor."""

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
    video: str = ""
    """Nothing: it takes no videos."""
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
    model_type: str = ""
    """If it is not the family's name."""
    tokens: tuple[str, ...] = ()
    """Further special tokens."""
    outer: Json = field(default_factory=dict)
    """Further keys of the outer configuration."""
    token_ids: dict[str, str] = field(default_factory=dict)
    """Key of the outer configuration → the special token whose id it takes."""
    processor_class: str = ""
    image_processor: Json = field(default_factory=dict)
    video_processor: Json = field(default_factory=dict)
    processor: Json = field(default_factory=dict)
