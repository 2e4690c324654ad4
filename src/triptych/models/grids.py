"""What a packed tower derives from the images' grids: positions, windows, where sequences end.

It depends on nothing but a frame's height and width in patches, so it is computed once for each
size, on the host, and put together for a batch. The tower takes it ready made and then never
waits for the device. A video is a row of frames of one size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from triptych.models.vision_attention import ends_of

REMEMBERED_SIZES = 64
Arguments = dict[str, Tensor | int]


@dataclass(frozen=True)
class _Frame:
    """One frame of ``patches`` patches, ``merged`` rows after merging."""

    patches: int
    merged: int
    by_patch: dict[str, Tensor]
    """Argument of the tower → (patches, ...)."""
    window_index: Tensor
    """(merged,) order of the rows by window; empty without windows."""
    windows: tuple[int, ...]
    """Patches of each window."""


class GridTables:
    """For a tower of Qwen2.5-VL or Qwen3-VL. ``lengths_on``: where its attention reads ends."""

    def __init__(self, tower: Any, device: torch.device, lengths_on: torch.device) -> None:
        self._tower = tower
        self._windowed = hasattr(tower, "window_size")
        self._interpolated = hasattr(tower, "num_grid_per_side")
        self._device = device
        self._lengths_on = lengths_on
        self._frame = lru_cache(maxsize=REMEMBERED_SIZES)(self._compute)

    def arguments(self, grids: Tensor) -> Arguments:
        """What the tower's forward takes besides pixels and ``grids``, (items, 3) on the host."""
        frames = [self._frame(h, w) for t, h, w in grids.tolist() for _ in range(t)]
        found = self._sequences("", [frame.patches for frame in frames])
        for name in frames[0].by_patch:
            found[name] = torch.cat([frame.by_patch[name] for frame in frames]).to(self._device)
        if self._windowed:
            starts = accumulate((frame.merged for frame in frames), initial=0)
            index = [f.window_index + start for f, start in zip(frames, starts, strict=False)]
            found["window_index"] = torch.cat(index).to(self._device)
            found |= self._sequences("window_", [n for frame in frames for n in frame.windows])
        return found

    def _sequences(self, kind: str, lengths: list[int]) -> Arguments:
        ends = ends_of(lengths).to(self._lengths_on)
        return {f"cu_{kind}seqlens": ends, f"max_{kind}seqlen": max(lengths)}

    def _compute(self, height: int, width: int) -> _Frame:
        tower, grid = self._tower, torch.tensor([[1, height, width]])
        merge = tower.spatial_merge_size
        by_patch = {"position_ids": get_vision_position_ids(grid, merge)}
        if self._interpolated:
            indices, weights = get_vision_interpolation_indices_and_weights(
                grid,
                num_grid_per_side=tower.num_grid_per_side,
                mode=tower.interpolation_mode,
                align_corners=tower.interpolation_align_corners,
                spatial_merge_size=merge,
            )
            by_patch |= {"interp_indices": indices, "interp_weights": weights}
        window_index, windows = torch.empty(0, dtype=torch.long), torch.empty(0)
        if self._windowed:
            window_index, ends = get_vision_window_index(
                grid, merge, tower.window_size, tower.patch_size
            )
            windows = ends.diff()
        patches = height * width
        return _Frame(patches, patches // merge**2, by_patch, window_index, tuple(windows.tolist()))
