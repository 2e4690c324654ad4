"""The first layer of packed towers as what it is: one row of a matrix product for each patch."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Conv3d, Module
from torch.nn.functional import linear


class PatchProjection(Module):
    """A convolution whose kernel covers all of its input. A GPU's convolution kernels are many
    times slower at that than its matrix product; the sums differ in order, thus in rounding."""

    def __init__(self, convolution: Conv3d) -> None:
        super().__init__()
        self.weight = convolution.weight
        self.bias = convolution.bias

    def forward(self, patches: Tensor) -> Tensor:
        """(patches, channels, frames, height, width) → (patches, width of the tower)."""
        return linear(patches.flatten(1), self.weight.flatten(1), self.bias)


def project_patches(tower: Any) -> None:
    """Let the tower's patches go through a matrix product. Its first layer is given patches."""
    if isinstance(tower.patch_embed.proj, Conv3d):
        tower.patch_embed.proj = PatchProjection(tower.patch_embed.proj)
