"""Families of models that tests go through, and their Transformers processors as a whole."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from transformers.processing_utils import ProcessorMixin

from tests.transformers_video import arrays_of_tensors, stand_in
from triptych.demo.tiny import FAMILIES
from triptych.media.pixtral import PixtralText
from triptych.media.placeholder import SAME_PROCESSOR
from triptych.media.processor import Processor

CORE = ("qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl")
"""In every test that is about families."""
MORE = tuple(sorted(set(FAMILIES) - set(CORE)))
"""In tests of their own and, in those of ``CORE``, when the full matrices are run."""
EVERY = (*CORE, *(pytest.param(family, marks=pytest.mark.full) for family in MORE))
CAUSAL = (*CORE, *(pytest.param(f, marks=pytest.mark.full) for f in MORE if f != "gemma3"))
"""Those whose tokens all attend to the tokens before them, and only to those."""
WITH_VIDEO = (
    *CORE,
    *(
        pytest.param(f, marks=pytest.mark.full)
        for f in MORE
        if FAMILIES[f].video_processor and f not in SAME_PROCESSOR
    ),
)
FOR_THE_TEXT = ("num_patches", "num_crops", "rows", "cols")


def whole_processor(processor: Processor) -> Any:
    """Transformers' processor of the same model, whose texts ours must equal."""
    hf = processor.hf
    if isinstance(hf, PixtralText):
        with stand_in():
            module = importlib.import_module("transformers.models.pixtral.processing_pixtral")
        settings, _ = ProcessorMixin.get_processor_dict(hf.tokenizer.name_or_path)
        settings.pop("processor_class")
        hf = module.PixtralProcessor(hf.image_processor, hf.tokenizer, **settings)
    return hf


def processed(processor: Processor, conversation: list[Any], **images: Any) -> dict[str, Any]:
    """What Transformers' processor makes of a conversation: tensors, of a batch of one.

    ``images``: what its image processor is told besides.
    """
    with arrays_of_tensors():
        made = whole_processor(processor).apply_chat_template(
            conversation,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"images_kwargs": images},
        )
    return {name: value for name, value in made.items() if name not in FOR_THE_TEXT}
