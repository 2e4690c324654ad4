"""What a video becomes: the frames that are sampled, their text, rows and pixels as model inputs.

As the checkpoint's Transformers video processor defines it. Those need torchvision, which may be
missing; of it they use a resize that torch has as well, so that what stands here is the same to
the bit, frame by frame: the whole video never lies in memory at its own size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.video_utils import VideoMetadata

from triptych.config import MediaLimits
from triptych.errors import BadVideo, UnsupportedModel
from triptych.media.clip_settings import BY_FAMILY, RESIZE_MODES, Json, merged
from triptych.media.layouts import MOST_PIXELS_A_SIDE, with_longest
from triptych.media.video import Frame, VideoHeader


@dataclass(frozen=True)
class VideoPlan:
    """What a video becomes, known from its header."""

    text: str
    """What replaces the video's marker in the prompt."""
    rows: int
    """Embedding rows."""
    grid: tuple[int, int, int] | None
    """(t, h, w) in patches for models with M-RoPE, else None."""
    second_per_grid: float | None
    """Seconds between two steps of ``t``, where the model's positions count time."""
    patches: int
    indices: tuple[int, ...]
    """The frames that are sampled."""
    size: tuple[int, int]
    """Height and width to which each is resized."""


class VideoProcessor:
    """Planning and preprocessing of single videos. Safe to use from several threads."""

    def __init__(self, family: str, hf: Any, settings: Json, row_token: str, patch: int) -> None:
        """``hf``: the processor class, which writes the text. ``settings``: what the checkpoint
        says of its video processor. ``row_token``: what stands for a row in the text. ``patch``:
        side of a vision patch, in pixels.

        Raises UnsupportedModel: the checkpoint asks for what is not done here.
        """
        self.name = str(settings.get("video_processor_type") or BY_FAMILY[family])
        if self.name != BY_FAMILY[family]:
            raise UnsupportedModel(f"video processor {self.name} is not supported")
        self.settings = merged(self.name, settings)
        self._family = family
        self._hf = hf
        self._row_token = row_token
        self._patch = patch
        # Transformers rescales and normalises in one step, with these.
        per_grey = 1.0 / self.settings["rescale_factor"]
        mean, std = (torch.tensor(self.settings[key]) for key in ("image_mean", "image_std"))
        self._mean = (mean * per_grey)[:, None, None]
        self._std = (std * per_grey)[:, None, None]

    def plan(self, header: VideoHeader, limits: MediaLimits) -> VideoPlan:
        """Raises BadVideo: too many frames, or a shape that the model's processor refuses."""
        try:
            indices = self._sample(header)
            if not 1 <= len(indices) <= limits.max_frames:
                raise BadVideo(
                    f"{len(indices)} frames of the video would be encoded, the limit is "
                    f"{limits.max_frames}"
                )
            if "temporal_patch_size" in self.settings:
                return self._plan_grid(header, indices)
            return self._plan_tiles(header, indices)
        except ValueError as exc:
            raise BadVideo(f"the model cannot take the video: {exc}") from exc

    def preprocess(self, frames: Iterable[Frame], plan: VideoPlan) -> dict[str, Tensor]:
        """The model's vision inputs; as many ``frames`` as were planned are taken."""
        height, width = plan.size
        pixels = torch.empty(len(plan.indices), 3, height, width)
        for place, frame in zip(pixels, frames, strict=True):
            place.copy_(self._resize(frame, height, width)).sub_(self._mean).div_(self._std)
        if plan.grid is not None:
            grid = torch.tensor([plan.grid])
            return {"pixel_values_videos": self._patches(pixels, plan), "video_grid_thw": grid}
        if self._family == "internvl":
            return {"pixel_values": pixels}  # its frames are images, one tile each
        if self._family == "smolvlm":
            return {"pixel_values": pixels[:, None]}  # as of images: tiles of one request each
        return {"pixel_values_videos": pixels[None]}

    # ------------------------------------------------------------------ sampling

    def _sample(self, header: VideoHeader) -> tuple[int, ...]:
        """The numbers of the frames that the model sees."""
        sample: Callable[[VideoHeader], Any] = {
            "Qwen2VLVideoProcessor": self._sample_even,
            "Qwen3VLVideoProcessor": self._sample_ends,
            "Glm4vVideoProcessor": self._sample_seconds,
            "LlavaOnevisionVideoProcessor": self._sample_first,
            "InternVLVideoProcessor": self._sample_middle,
            "SmolVLMVideoProcessor": self._sample_between,
        }[self.name]
        return tuple(int(index) for index in sample(header))

    def _wanted(self, header: VideoHeader) -> float:
        """Frames that ``num_frames`` or ``fps`` ask for."""
        settings = self.settings
        if settings["num_frames"] is not None:
            return float(settings["num_frames"])
        return float(header.frames / header.fps * settings["fps"])

    def _sample_even(self, header: VideoHeader) -> Any:
        settings, total = self.settings, header.frames
        step = settings["temporal_patch_size"]
        if settings["num_frames"] is not None:
            n_frames = min(round(settings["num_frames"] / step), total // step) * step
        else:
            most = math.floor(min(settings["max_frames"], total) / step) * step
            wanted = min(max(self._wanted(header), settings["min_frames"]), most, total)
            n_frames = math.floor(wanted / step) * step
        if not step <= n_frames <= total:
            raise ValueError(f"it needs {step} frames or more")
        return torch.arange(0, total, total / n_frames).int()

    def _sample_ends(self, header: VideoHeader) -> Any:
        settings, total = self.settings, header.frames
        wanted = max(int(self._wanted(header)), settings["min_frames"])
        n_frames = min(wanted, settings["max_frames"], total)
        return np.linspace(0, total - 1, n_frames).round().astype(int)

    def _sample_seconds(self, header: VideoHeader) -> Any:
        """``fps`` of each second, of long videos evenly; an odd last frame twice."""
        fps, most_s = self.settings["fps"], self.settings["max_duration"]
        duration = header.frames / header.fps
        if duration <= most_s:
            n_frames = max(math.floor(duration * fps), 1)
            wanted = [math.ceil(i * header.fps / fps) for i in range(n_frames)]
        elif int(most_s * fps) >= header.frames:
            wanted = list(range(header.frames))
        else:
            times = np.linspace(0, duration, int(most_s * fps)).tolist()
            wanted = [math.ceil(seconds * header.fps) for seconds in times]
        indices = list(dict.fromkeys(min(index, header.frames - 1) for index in wanted))
        return indices + indices[-1:] * (len(indices) % 2)

    def _sample_first(self, header: VideoHeader) -> Any:
        n_frames = min(max(1, int(self._wanted(header))), header.frames)
        return np.arange(n_frames) * header.frames // n_frames

    def _sample_middle(self, header: VideoHeader) -> Any:
        total = header.frames
        n_frames = min(max(1, int(self._wanted(header))), total)
        shift = self.settings["initial_shift"]
        start = total / n_frames / 2 if shift is True else float(shift)
        return torch.arange(start, total, total / n_frames).int()

    def _sample_between(self, header: VideoHeader) -> Any:
        """``fps`` of each second, ``num_frames`` at most; of long videos not the first and the last
        second."""
        fps, most = self.settings["fps"], self.settings["num_frames"]
        duration = header.frames / header.fps
        first, last = 0, header.frames - 1
        if duration - 2 > most * fps:
            inner = int(header.fps), min(int(header.frames - header.fps), last)
            first, last = inner if inner[0] < inner[1] else (first, last)
        n_frames = max(min(round(fps * duration), most), 1)
        return np.unique(np.linspace(first, last, n_frames, dtype=int))

    # ------------------------------------------------------------------ plans

    def _plan_grid(self, header: VideoHeader, indices: tuple[int, ...]) -> VideoPlan:
        settings = self.settings
        patch, temporal = settings["patch_size"], settings["temporal_patch_size"]
        height, width = self._smart_size(header, len(indices))
        grid = (math.ceil(len(indices) / temporal), height // patch, width // patch)
        sampled_fps = len(indices) / header.frames * header.fps
        facts = {
            "video_grid_thw": np.array([grid]),
            "video_metadata": [_metadata(header, indices)],
        }
        text = str(self._hf.replace_video_token(facts, 0))
        seconds = temporal / sampled_fps if self._family == "qwen2_5_vl" else None
        rows = text.count(self._row_token)
        return VideoPlan(text, rows, grid, seconds, math.prod(grid), indices, (height, width))

    def _smart_size(self, header: VideoHeader, n_frames: int) -> tuple[int, int]:
        """Whole patches, near the frame's shape, within the budget of pixels."""
        settings, size = self.settings, self.settings["size"]
        temporal = settings["temporal_patch_size"]
        factor = settings["patch_size"] * settings["merge_size"]
        least, most = size["shortest_edge"], size["longest_edge"]
        floor = int(least * 1.05)
        if self.name == "Qwen2VLVideoProcessor":
            if settings.get("cap_pixels_per_frame"):
                budget = int(settings["max_video_tokens"] * factor * factor * 0.9)
                most = max(min(most, budget * temporal // n_frames), floor)
            return _fit(header, (1, 1), factor, least, most)
        if n_frames < temporal:
            raise ValueError(f"it needs {temporal} frames or more")
        if settings.get("cap_pixels_per_frame"):
            cap = settings["max_video_tokens"] * factor * factor
            most = max(min(cap, most // n_frames), floor) * n_frames
        whole = round(n_frames / temporal) * temporal
        return _fit(header, (n_frames, whole), factor, least, most)

    def _plan_tiles(self, header: VideoHeader, indices: tuple[int, ...]) -> VideoPlan:
        size = self.settings["size"]
        if self._family == "smolvlm":
            height = width = self.settings["max_image_size"]["longest_edge"]
        else:
            height, width = size["height"], size["width"]
        # Only the shape is looked at: a broadcast zero has it and no memory.
        pixels = np.broadcast_to(np.float32(0), (1, len(indices), 3, height, width))
        facts = {
            "pixel_values_videos": pixels,
            "pixel_values": pixels,
            "video_metadata": [_metadata(header, indices)],
        }
        text = str(self._hf.replace_video_token(facts, 0))
        patches = len(indices) * (height // self._patch) * (width // self._patch)
        rows = text.count(self._row_token)
        return VideoPlan(text, rows, None, None, patches, indices, (height, width))

    # ------------------------------------------------------------------ pixels

    def _resize(self, frame: Frame, height: int, width: int) -> Tensor:
        """(3, height, width) uint8."""
        pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)
        if self._family == "smolvlm":  # which squeezes what it has resized in its own shape
            longest = min(self.settings["size"]["longest_edge"], MOST_PIXELS_A_SIDE)
            tall, wide = with_longest(longest, frame.shape[1], frame.shape[0])
            pixels = self._resized(pixels, tall, wide)
        return self._resized(pixels, height, width)

    def _resized(self, pixels: Tensor, height: int, width: int) -> Tensor:
        if tuple(pixels.shape[1:]) == (height, width):
            return pixels
        mode = RESIZE_MODES[self.settings["resample"]]
        resized = torch.nn.functional.interpolate(
            pixels[None], (height, width), mode=mode, antialias=True
        )
        return resized[0]

    def _patches(self, pixels: Tensor, plan: VideoPlan) -> Tensor:
        """(patches, values) of (frames, 3, height, width), the rows of a merged patch together."""
        settings = self.settings
        patch, merge = settings["patch_size"], settings["merge_size"]
        temporal = settings["temporal_patch_size"]
        assert plan.grid is not None
        t, h, w = plan.grid
        missing = t * temporal - len(pixels)
        if missing:
            pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
        cut = pixels.view(t, temporal, 3, h // merge, merge, patch, w // merge, merge, patch)
        return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1)


def _metadata(header: VideoHeader, indices: tuple[int, ...]) -> VideoMetadata:
    return VideoMetadata(
        header.frames,
        fps=header.fps,
        duration=header.frames / header.fps,
        frames_indices=list(indices),
    )


def _fit(
    header: VideoHeader, frames: tuple[int, int], factor: int, least: int, most: int
) -> tuple[int, int]:
    """Height and width in multiples of ``factor``, so that the pixels of all frames together lie
    between ``least`` and ``most``. ``frames``: their number, and that rounded to whole patches.

    Raises ValueError: more than 200 times as long as wide.
    """
    height, width = header.height, header.width
    n_frames, whole = frames
    if whole > 1 and (height < factor or width < factor):
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > 200:
        raise ValueError("one side is more than 200 times as long as the other")
    tall, wide = (round(side / factor) * factor for side in (height, width))
    if whole * tall * wide > most:
        scale = math.sqrt(n_frames * height * width / most)
        tall, wide = (
            max(factor, math.floor(side / scale / factor) * factor) for side in (height, width)
        )
    elif whole * tall * wide < least:
        scale = math.sqrt(least / (n_frames * height * width))
        tall, wide = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return tall, wide
