"""Transformers' own processor with its video half, where torchvision is missing too.

Its video processors call four functions of torchvision. Where that is not installed, torch's own
stand in for them; on a machine that has it (the GPU tests') the real ones are called.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL.Image import Resampling
from torch import Tensor
from transformers import image_processing_backends, video_processing_utils
from transformers.utils import is_torch_greater_or_equal, is_torchvision_available

from triptych.config import ModelConfig
from triptych.media.processor import Processor


class InterpolationMode(Enum):
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


def resize(
    image: Tensor, size: tuple[int, int], interpolation: InterpolationMode, antialias: bool
) -> Tensor:
    flat = image.reshape(-1, *image.shape[-3:])
    resized = torch.nn.functional.interpolate(
        flat, size, mode=interpolation.value, antialias=antialias
    )
    return resized.reshape(*image.shape[:-2], *size)


def normalize(image: Tensor, mean: Any, std: Any, inplace: bool = False) -> Tensor:
    mean, std = (torch.as_tensor(v, dtype=image.dtype).view(-1, 1, 1) for v in (mean, std))
    return (image - mean).div_(std)


def grayscale_to_rgb(image: Tensor) -> Tensor:
    return image.expand(*image.shape[:-3], 3, -1, -1) if image.shape[-3] == 1 else image


@contextmanager
def stand_in() -> Iterator[None]:
    """Only while Transformers' modules are imported: nobody else is to find a torchvision."""
    functional = ModuleType("torchvision.transforms.v2.functional")
    for thing in (InterpolationMode, resize, normalize, grayscale_to_rgb):
        setattr(functional, thing.__name__, thing)
    names = ["torchvision", "torchvision.transforms", "torchvision.transforms.v2"]
    modules = {name: ModuleType(name) for name in names} | {functional.__name__: functional}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
    filters = {Resampling.BILINEAR: InterpolationMode.BILINEAR}
    filters[Resampling.BICUBIC] = InterpolationMode.BICUBIC
    filters[Resampling.LANCZOS] = InterpolationMode.LANCZOS
    for module in (image_processing_backends, video_processing_utils):
        module.tvF = functional  # type: ignore[attr-defined]
    image_processing_backends.pil_torch_interpolation_mapping = filters
    image_processing_backends.is_torchvision_greater_or_equal = _of_this_torch


def _of_this_torch(version: str) -> bool:
    """Is the torchvision that was released with this torch of ``version`` or later?"""
    torch_of = {"0.27": "2.12"}
    return bool(is_torch_greater_or_equal(torch_of[version]))


FOLDERS = {
    "Qwen2VLVideoProcessor": "qwen2_vl",
    "Qwen3VLVideoProcessor": "qwen3_vl",
    "Glm4vVideoProcessor": "glm4v",
    "LlavaOnevisionVideoProcessor": "llava_onevision",
    "InternVLVideoProcessor": "internvl",
    "SmolVLMVideoProcessor": "smolvlm",
}


def video_processor_class(name: str) -> Any:
    """Transformers' class of this name."""
    module = f"transformers.models.{FOLDERS[name]}.video_processing_{FOLDERS[name]}"
    if is_torchvision_available() or module in sys.modules:
        return getattr(importlib.import_module(module), name)
    with stand_in():
        return getattr(importlib.import_module(module), name)


@contextmanager
def arrays_of_tensors() -> Iterator[None]:
    """Some processors hand tensors to NumPy, which warns of how they become arrays."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array", DeprecationWarning)
        yield


def full_processor(folder: Path) -> Any:
    """The checkpoint's processor as Transformers would load it."""
    processor = Processor(ModelConfig(str(folder))).hf
    settings, _ = video_processing_utils.BaseVideoProcessor.get_video_processor_dict(str(folder))
    # The first checkpoints of SmolVLM do not say.
    cls = video_processor_class(settings.get("video_processor_type", "SmolVLMVideoProcessor"))
    processor.video_processor = cls.from_pretrained(folder)
    return processor
