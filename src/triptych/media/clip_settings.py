"""What a checkpoint's files say of its video processor, over what the class does by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers.utils import is_torch_greater_or_equal

from triptych.errors import UnsupportedModel

Json = dict[str, Any]

CLIP: Json = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
COMMON: Json = {"resample": 3, "rescale_factor": 1 / 255, "fps": None, "num_frames": None}
QWEN: Json = {"temporal_patch_size": 2, "merge_size": 2, "min_frames": 4, "max_frames": 768}
DEFAULTS: dict[str, Json] = {
    "Qwen2VLVideoProcessor": {
        **COMMON, **CLIP, **QWEN, "patch_size": 14, "max_video_tokens": 128_000,
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28},
        "fps": 2,
    },
    "Qwen3VLVideoProcessor": {
        **COMMON, **QWEN, "patch_size": 16, "max_video_tokens": 768,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32},
        "fps": 2,
    },
    "Glm4vVideoProcessor": {
        **COMMON, **CLIP, "temporal_patch_size": 2, "merge_size": 2, "patch_size": 14,
        "size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 2 * 30_000},
        "fps": 2, "max_duration": 300,
    },
    "LlavaOnevisionVideoProcessor": {
        **COMMON, **CLIP, "size": {"height": 384, "width": 384}, "num_frames": 32,
    },
    "InternVLVideoProcessor": {
        **COMMON, **CLIP, "size": {"height": 384, "width": 384}, "num_frames": 8,
        "initial_shift": True,
    },
    "SmolVLMVideoProcessor": {
        **COMMON, "resample": 1, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
        "size": {"longest_edge": 4 * 364}, "max_image_size": {"longest_edge": 364},
        "fps": 1, "num_frames": 64,
    },
}  # fmt: skip
"""Settings by class, where a checkpoint's files are silent. They are Transformers' but for how
many frames are taken (``fps``, ``num_frames``): all but Qwen3-VL's classes leave that to their
caller and take every frame when not told. Here it is what the models were made for."""
BY_FAMILY = {
    "glm4v": "Glm4vVideoProcessor",
    "qwen2_5_vl": "Qwen2VLVideoProcessor",
    "qwen2_vl": "Qwen2VLVideoProcessor",
    "qwen3_vl": "Qwen3VLVideoProcessor",
    "llava_onevision": "LlavaOnevisionVideoProcessor",
    "internvl": "InternVLVideoProcessor",
    "smolvlm": "SmolVLMVideoProcessor",
}
LANCZOS, BICUBIC = 1, 3
RESIZE_MODES = {LANCZOS: "lanczos", 2: "bilinear", BICUBIC: "bicubic"}
"""By Pillow's number of the filter."""


def merged(name: str, settings: Json) -> Json:
    """The checkpoint's settings over the class's. Raises UnsupportedModel."""
    given = {key: value for key, value in settings.items() if value is not None}
    if name == "Glm4vVideoProcessor":
        given.pop("num_frames", None)  # it has one and does not look at it
    if name == "SmolVLMVideoProcessor":  # which looks at both
        given |= _smol_sampling(given)
    elif given.get("num_frames") is not None or given.get("fps") is not None:
        given.setdefault("num_frames", None)
        given.setdefault("fps", None)
    found = {**DEFAULTS[name], **given}
    if name == "Qwen2VLVideoProcessor":  # spelt so in the first checkpoints
        size = dict(found["size"])
        size["shortest_edge"] = found.get("min_pixels") or size.get("shortest_edge")
        size["longest_edge"] = found.get("max_pixels") or size.get("longest_edge")
        found["size"] = size
    for reason in _unsupported(name, found):
        raise UnsupportedModel(f"{name} with {reason} is not supported")
    if found["resample"] == LANCZOS and not is_torch_greater_or_equal("2.12"):
        found["resample"] = BICUBIC  # as Transformers does with the torchvision of such a torch
    return found


def _smol_sampling(given: Json) -> Json:
    """What SmolVLM's checkpoints say of sampling under a name of its own, by the usual names. It is
    preferred, but for the size."""
    sampling = given.get("video_sampling", {})
    names = {"max_frames": "num_frames", "fps": "fps"} | (
        {} if "size" in given else {"video_size": "size"}
    )
    return {names[key]: value for key, value in sampling.items() if key in names and value}


def _unsupported(name: str, settings: Json) -> Iterator[str]:
    for size in ("size", "max_image_size"):
        sides = tuple(DEFAULTS[name].get(size, ()))
        if not all(settings[size].get(side) for side in sides):
            yield f"a {size} without {' and '.join(sides)}"
    if settings["resample"] not in RESIZE_MODES:
        yield f"resampling by filter {settings['resample']}"
    if settings.get("do_center_crop"):
        yield "cropping"
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if settings.get(step) is False:
            yield f"{step} = false"
