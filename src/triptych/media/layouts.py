"""What an image of a given size becomes, family by family: what its text depends on, its patches.

Each function says of a header what the image processor would find out from the pixels. The text
itself is written by Transformers' processor class, which is told these facts.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.image_processing_utils import select_best_resolution

from triptych.errors import UnsupportedModel
from triptych.media.image import ImageHeader
from triptych.request import LOW_SIDE, Detail

Json = dict[str, Any]
MOST_PIXELS_A_SIDE = 4096
"""Idefics' processor resizes a third time what is longer."""


@dataclass(frozen=True)
class Layout:
    facts: Json
    """What the processor class needs to know of the image for its text."""
    grid: tuple[int, int, int] | None
    """(t, h, w) in patches for models with M-RoPE, else None."""
    patches: int
    """Of the vision tower."""


@dataclass(frozen=True)
class Parts:
    """Of a checkpoint."""

    hf: Any
    """The processor class."""
    vision: Any
    """The vision tower's configuration."""
    options: Json
    """What the image processor is asked for, as ``options`` says."""

    @property
    def images(self) -> Any:
        """The image processor."""
        return self.hf.image_processor

    @property
    def size(self) -> Any:
        """As the image processor uses it."""
        return self.options.get("size", self.images.size)


def options(family: str, hf: Any, detail: Detail = "high") -> Json:
    """What the processor class asks of its image processor, whatever that one's own settings say,
    and for low detail what keeps images small there.

    ``hf``: the processor class. Families that say nothing of low detail know one size only.
    """
    images = hf.image_processor
    match family:
        case "internvl":
            return {"crop_to_patches": detail == "high"}
        case "qwen2_vl" | "qwen2_5_vl" | "qwen3_vl" if detail == "low":
            return _at_most(images.size, LOW_SIDE**2)
        case "glm4v" if detail == "low":  # which counts an image's pixels once for each frame
            return _at_most(images.size, images.temporal_patch_size * LOW_SIDE**2)
        case "idefics3" | "smolvlm" if detail == "low":
            return {"do_image_splitting": False}
        case "gemma3":
            return {"do_convert_rgb": True, "do_pan_and_scan": False}
        case "llava_next":
            return {"do_pad": True}
        case "mistral3" | "pixtral":
            limit = _at_most(images.size, LOW_SIDE) if detail == "low" else {}
            return {"patch_size": hf.patch_size * hf.spatial_merge_size, **limit}
        case _:
            return {}


def _at_most(size: Any, limit: int) -> Json:
    """The option that brings ``size`` below ``limit``; nothing if it is there."""
    smaller = {name: min(side, limit) for name, side in dict(size).items()}
    return {} if smaller == dict(size) else {"size": smaller}


def layout(family: str, parts: Parts, header: ImageHeader, images_in_request: int) -> Layout:
    """``family``: one that has a marker. Raises ValueError: a shape that the processor refuses;
    UnsupportedModel: settings with which nothing is known before the pixels are."""
    return LAYOUTS[family](parts, header, images_in_request)


# ------------------------------------------------------------------ grids


def _qwen(parts: Parts, header: ImageHeader, images_in_request: int) -> Layout:
    images = parts.images
    sides = _resize_of(images)(
        header.height,
        header.width,
        factor=images.patch_size * images.merge_size,
        min_pixels=parts.size["shortest_edge"],
        max_pixels=parts.size["longest_edge"],
    )
    return _grid(sides, images.patch_size)


def _glm(parts: Parts, header: ImageHeader, images_in_request: int) -> Layout:
    images = parts.images
    sides = _resize_of(images)(
        num_frames=images.temporal_patch_size,
        height=header.height,
        width=header.width,
        temporal_factor=images.temporal_patch_size,
        factor=images.patch_size * images.merge_size,
        min_pixels=parts.size["shortest_edge"],
        max_pixels=parts.size["longest_edge"],
    )
    return _grid(sides, images.patch_size)


def _resize_of(images: Any) -> Callable[..., tuple[int, int]]:
    found: Callable[..., tuple[int, int]] = inspect.getmodule(type(images)).smart_resize  # type: ignore[union-attr]
    return found


def _grid(sides: tuple[int, int], patch: int) -> Layout:
    grid = (1, sides[0] // patch, sides[1] // patch)
    return Layout({"image_grid_thw": np.array([grid])}, grid, math.prod(grid))


def _pixtral(parts: Parts, header: ImageHeader, images_in_request: int) -> Layout:
    patch, size = parts.hf.patch_size * parts.hf.spatial_merge_size, dict(parts.size)
    longest = size.get("longest_edge")
    limits = (longest, longest) if longest else (size["height"], size["width"])
    height, width = header.height, header.width
    ratio = max(height / limits[0], width / limits[1])
    if ratio > 1:
        height, width = math.floor(height / ratio), math.floor(width / ratio)
    if not (height and width):
        raise ValueError("one side is too short for the other")
    height, width = (math.ceil(side / patch) * patch for side in (height, width))
    patches = math.prod(side // parts.vision.patch_size for side in (height, width))
    return Layout({"image_sizes": [(height, width)]}, None, patches)


# ------------------------------------------------------------------ tiles


def _llava_onevision(parts: Parts, header: ImageHeader, images_in_request: int) -> Layout:
    tile = parts.images.size["height"]
    tiles = 1
    if images_in_request == 1:
        tiles += _tiles_around(parts, header, tile)
    facts = {
        "batch_num_images": [images_in_request],
        "image_sizes": [[header.height, header.width]],
        "pixel_values": _shape(1, tiles, 3, tile, tile),
    }
    return Layout(facts, None, tiles * parts.hf.num_image_tokens)


def _llava_next(parts: Parts, header: ImageHeader, images_in_request: int) -> Layout:
    height, width = _cropped(parts.images)
    tiles = 1 + _tiles_around(parts, header, height)
    facts = {
        "image_sizes": [[header.height, header.width]],
        "pixel_values": _shape(1, tiles, 3, height, width),
    }
    return Layout(facts, None, tiles * _patches(parts, height, width))


def _tiles_around(parts: Parts, header: ImageHeader, tile: int) -> int:
    size, pinpoints = (header.height, header.width), parts.images.image_grid_pinpoints
    best = select_best_resolution(size, pinpoints)
    return math.prod(math.ceil(side / tile) for side in best)


def _llava(parts: Parts, header: ImageHeader, images_in_request: int) -> Layout:
    height, width = _cropped(parts.images)
    return Layout(
        {"pixel_values": _shape(1, 3, height, width)}, None, _patches(parts, height, width)
    )


def _internvl(parts: Parts, header: ImageHeader, images_in_request: int) -> Layout:
    tiles = parts.images.get_number_of_image_patches(header.height, header.width, parts.options)
    height, width = parts.vision.image_size
    return Layout({"num_patches": [tiles]}, None, tiles * _patches(parts, height, width))


def _idefics(parts: Parts, header: ImageHeader, images_in_request: int) -> Layout:
    images = parts.images
    tile = images.max_image_size["longest_edge"]
    rows, columns = 0, 0
    if parts.options.get("do_image_splitting", images.do_image_splitting):
        # Not ``get_number_of_image_patches``: its height is not that of the resized image.
        longest = images.size["longest_edge"]
        if not 0 < (longest or 0) <= MOST_PIXELS_A_SIDE:
            size = dict(images.size)
            raise UnsupportedModel(f"images resized to {size} before tiling are not supported")
        tall, wide = _tiled(*with_longest(longest, header.width, header.height), tile)
        if max(tall, wide) > tile:
            rows, columns = tall // tile, wide // tile
    facts = {"rows": [[rows]], "cols": [[columns]]}
    return Layout(facts, None, (rows * columns + 1) * _patches(parts, tile, tile))


def with_longest(longest: int, width: int, height: int) -> tuple[int, int]:
    """Height and width after Idefics' first resize: the longer side as told, the other even."""
    ratio = width / height
    if width >= height:
        height = int(longest / ratio)
        return max(height + height % 2, 1), longest
    width = int(longest * ratio)
    return longest, max(width + width % 2, 1)


def _tiled(height: int, width: int, tile: int) -> tuple[int, int]:
    """Height and width after the second resize: whole tiles."""
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        return math.ceil(int(width / ratio) / tile) * tile, width
    height = math.ceil(height / tile) * tile
    return height, math.ceil(int(height * ratio) / tile) * tile


def _gemma(parts: Parts, header: ImageHeader, images_in_request: int) -> Layout:
    size = parts.images.size
    return Layout({"num_crops": [0]}, None, _patches(parts, size["height"], size["width"]))


def _cropped(images: Any) -> tuple[int, int]:
    """Height and width of every image."""
    size = images.crop_size if images.do_center_crop else images.size
    if not (size and size["height"] and size["width"]):
        raise UnsupportedModel(
            f"{type(images).__name__} without cropping and without a fixed size is not supported"
        )
    return size["height"], size["width"]


def _patches(parts: Parts, height: int, width: int) -> int:
    patch = parts.vision.patch_size
    tall, wide = (patch, patch) if isinstance(patch, int) else patch
    return int((height // tall) * (width // wide))


def _shape(*shape: int) -> Any:
    """Only the shape of pixels is looked at: a broadcast zero has it and no memory."""
    return np.broadcast_to(np.float32(0), shape)


LAYOUTS: dict[str, Callable[[Parts, ImageHeader, int], Layout]] = {
    "gemma3": _gemma,
    "glm4v": _glm,
    "idefics3": _idefics,
    "internvl": _internvl,
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "mistral3": _pixtral,
    "pixtral": _pixtral,
    "qwen2_5_vl": _qwen,
    "qwen2_vl": _qwen,
    "qwen3_vl": _qwen,
    "smolvlm": _idefics,
}
