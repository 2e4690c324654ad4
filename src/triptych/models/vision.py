"""The encoder half: preprocessed images and videos in, embeddings out."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from triptych.errors import UnsupportedModel
from triptych.models.captured import Capture, CapturedTower
from triptych.models.compiled import compile_blocks
from triptych.models.grids import GridTables
from triptych.models.patches import project_patches
from triptych.models.vision_attention import ends_of, has_kernel, pack_attention

logger = logging.getLogger(__name__)

Item = dict[str, Tensor]
"""The processor's output for one item, first dimension first: of an image ``pixel_values`` and what
goes with it (``image_grid_thw``, ``image_sizes``, ``batch_num_images``, or a mask), of a video
``pixel_values_videos`` and perhaps ``video_grid_thw`` (or as an image of many crops)."""
VIDEO_PIXELS = "pixel_values_videos"


class VisionModel:
    """Vision tower and projector of one model, as loaded by ``loading.load_encoder``."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self._model = model
        self._inputs = _input_names(model.get_image_features)
        if hasattr(model, "get_video_features"):
            self._inputs += [VIDEO_PIXELS, "video_grid_thw"]
            self._video_argument = _input_names(model.get_video_features)[0]
        self.width: int = config.get_text_config().hidden_size
        self.planes = planes(config)
        """1 + DeepStack planes."""
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self._patch = _pair(config.vision_config.patch_size)
        self._tables: GridTables | None = None
        """For towers that pack images of different sizes into one row of patches."""
        self._pads = False
        """Such a tower that is given padded images and their sizes."""
        # Where lengths and grids are read: on the host, but by kernels.
        self._lengths_on = self._grids_on = torch.device("cpu")
        self._reads_grids = False
        """Does the tower's forward depend on more than what is computed from the grids here?"""
        if pack_attention(model):
            self._set_up_packing(model)

    def _set_up_packing(self, model: Any) -> None:
        if has_kernel(self.device, self.dtype):
            self._lengths_on = self.device
        tower = getattr(model.model, "visual", None)
        if tower is None:
            self._pads = True
            return
        self._reads_grids = hasattr(tower, "embeddings")
        if self._reads_grids:  # GLM-4V looks its position embeddings up by both
            self._lengths_on = self._grids_on = self.device
        self._tables = GridTables(tower, self.device, self._lengths_on)
        if self.device.type == "cuda":
            project_patches(tower)

    def compile(self, folder: Path) -> None:
        """Let the blocks be compiled at the first forward; ``folder`` keeps the result."""
        n = compile_blocks(self._model, folder)
        logger.info("%d vision blocks will be compiled, with their cache in %s", n, folder)

    @property
    def can_be_captured(self) -> bool:
        """As CUDA graphs: nothing in a forward is read on the host."""
        return self._fills_up and has_kernel(self.device, self.dtype)

    @property
    def _fills_up(self) -> bool:
        """May a batch be computed with patches of nobody's behind it?"""
        return self._tables is not None and not self._reads_grids

    def capture(self, capture: Capture) -> None:
        """Let forwards of shapes that come again be captured, where the tower packs its patches and
        takes all that follows from their sizes ready made: it must not ask the device for any."""
        if self._fills_up:
            tower = self._model.model.visual
            tower.forward = CapturedTower(tower, tower.spatial_merge_size**2, capture)

    def stage(self, item: Item) -> Item:
        """The item as ``encode`` takes it soonest: in the model's dtype and, for a GPU, in
        page-locked memory. From any thread."""
        return {name: self._staged(value) for name, value in item.items()}

    def _staged(self, value: Tensor) -> Tensor:
        if not value.is_floating_point() or value.device.type == "cuda":
            return value  # was preprocessed there; the engine's stream casts it
        if self.device.type == "cpu":
            return value.to(self.dtype)
        return torch.empty(value.shape, dtype=self.dtype, pin_memory=True).copy_(value)

    @torch.inference_mode()
    def encode(self, batch: Sequence[Item]) -> list[Tensor]:
        """The embedding of each item, (planes, rows, width) contiguous, in the model's dtype.

        Items whose tensors can be concatenated share a forward. Raises UnsupportedModel when the
        tower makes another number of planes than its configuration says.
        """
        groups: dict[object, list[int]] = {}
        for index, item in enumerate(batch):
            groups.setdefault(self._group(item), []).append(index)
        embeddings: dict[int, Tensor] = {}
        for indices in groups.values():
            results = self._forward([batch[index] for index in indices])
            embeddings.update(zip(indices, results, strict=True))
        return [embeddings[index] for index in range(len(batch))]

    def patches(self, item: Item) -> int:
        """Vision patches of the item: what its forward costs."""
        pixels = _pixels(item)
        if pixels.ndim == 2:  # one row a patch
            return pixels.shape[0]
        height, width = pixels.shape[-2:]
        crops = math.prod(pixels.shape[:-3])
        return crops * (height // self._patch[0]) * (width // self._patch[1])

    def _group(self, item: Item) -> object:
        if self._pads:
            return None
        shapes = tuple((name, item[name].shape[1:]) for name in self._inputs if name in item)
        # LLaVA-OneVision lays an image out differently when it is not the request's only one.
        alone = "batch_num_images" in item and int(item["batch_num_images"][0]) == 1
        return shapes, alone

    def _forward(self, items: list[Item]) -> list[Tensor]:
        if VIDEO_PIXELS in items[0]:
            arguments = self._arguments(items, "video")
            arguments[self._video_argument] = arguments.pop(VIDEO_PIXELS)  # its name varies
            output = self._model.get_video_features(**arguments, return_dict=True)
        else:
            arguments = self._padded(items) if self._pads else self._arguments(items, "image")
            output = self._model.get_image_features(**arguments, return_dict=True)
        features = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
        if len(features) != self.planes:
            raise UnsupportedModel(f"the tower made {len(features)} planes, not {self.planes}")
        split = [self._split(plane, items) for plane in features]
        if not all(split):
            return [self._forward([item])[0] for item in items]
        return [torch.stack(item_planes) for item_planes in zip(*split, strict=True)]

    def _arguments(self, items: list[Item], kind: str) -> dict[str, Any]:
        names = [name for name in self._inputs if name in items[0]]
        arguments: dict[str, Any] = {}
        if self._tables is not None:
            name = f"{kind}_grid_thw"
            names.remove(name)  # mostly stays on the host: nothing there waits for a device
            grids = torch.cat([item[name] for item in items])
            ready_made = self._tables.arguments(grids)
            arguments = {f"{kind}_{key}": value for key, value in ready_made.items()}
            arguments[name] = grids.to(self._grids_on)
        for name in names:
            arguments[name] = _joined([self._place(item[name]) for item in items])
        return arguments

    def _padded(self, items: list[Item]) -> dict[str, Any]:
        """Images of any sizes at the top left of equal frames, and where their patches end."""
        sizes = torch.cat([item["image_sizes"] for item in items])
        height, width = sizes.amax(0).tolist()
        pixels = torch.zeros(len(items), 3, height, width, dtype=self.dtype, device=self.device)
        for frame, item, (h, w) in zip(pixels, items, sizes.tolist(), strict=True):
            frame[:, :h, :w] = self._place(item["pixel_values"])[0]
        lengths: list[int] = [self.patches(item) for item in items]
        return {
            "pixel_values": pixels,
            "image_sizes": sizes,
            "cu_seq_lens_q": ends_of(lengths).to(self._lengths_on),
            "max_length_q": max(lengths),
        }

    def _place(self, value: Tensor) -> Tensor:
        dtype = self.dtype if value.is_floating_point() else value.dtype
        return value.to(self.device, dtype, non_blocking=True)

    def _split(self, features: Any, items: list[Item]) -> list[Tensor]:
        """``features`` of one plane, (rows, width) for each item; none if it does not say which.

        They come as a tensor or sequence over images or over crops, or as one flat tensor.
        """
        if len(items) == 1:
            return [_rows(features)]
        pixels = [_pixels(item) for item in items]
        for parts in ([1] * len(items), [p.shape[0] for p in pixels]):
            if len(features) == sum(parts) and features[0].ndim > 1:
                ends = torch.tensor(parts).cumsum(0).tolist()
                return [_rows(features[e - n : e]) for n, e in zip(parts, ends, strict=True)]
        rows = _rows(features)
        per_patch = len(rows) / sum(self.patches(item) for item in items)
        counts = [round(self.patches(item) * per_patch) for item in items]
        if pixels[0].ndim == 2 and sum(counts) == len(rows):
            return list(torch.split(rows, counts))
        return []


def planes(config: Any) -> int:
    """1 + the DeepStack planes of the model with this configuration."""
    return 1 + len(getattr(config.vision_config, "deepstack_visual_indexes", None) or ())


def _pixels(item: Item) -> Tensor:
    return item[VIDEO_PIXELS] if VIDEO_PIXELS in item else item["pixel_values"]


def _joined(tensors: list[Tensor]) -> Tensor:
    """``torch.cat``, which copies a lone one: the pixels of a small image take a millisecond."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _rows(features: Any) -> Tensor:
    """(rows, width), from a tensor or a sequence of tensors whose last dimension is the width."""
    if isinstance(features, Tensor):
        return features.reshape(-1, features.shape[-1])
    return _joined([_rows(part) for part in features])


def _input_names(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width
