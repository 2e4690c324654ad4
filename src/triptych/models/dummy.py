"""Random weights that depend on a parameter's name, its shape and the seed, and on nothing else.

Two processes that each load one half of a model therefore hold the two halves of one and the same
model, and two processes that load the same half agree.
"""

from __future__ import annotations

import hashlib
import math
from types import MappingProxyType

import torch
from torch import Tensor, nn

from triptych.models.parallel import Cuts

BIAS_STD = 0.02
EMBEDDING_STD = 1.0
POSITION_STD = 0.3
MATRIX_GAIN = 1.5
HEAD_GAIN = 2.5
"""Standard deviation of the logits: the likeliest token is then clearly apart from the second."""


def fill_random(model: nn.Module, seed: int, cuts: Cuts = MappingProxyType({})) -> None:
    """Overwrite every parameter of ``model`` (none on the meta device) in place.

    ``cuts``: parameters that are parts; they get their part of what the whole would be.

    The scales are chosen so that a small model is not degenerate: residual streams keep their
    size, an image changes the answer, greedy answers do not repeat one token. Numbers are drawn
    on the parameter's device in float32; devices of different kinds draw different numbers.
    """
    for name, parameter in model.named_parameters(remove_duplicate=True):
        cut = cuts.get(name)
        shape = parameter.shape if cut is None else cut.whole(parameter.shape)
        whole = _draw(name, shape, parameter.device, seed)
        with torch.no_grad():
            parameter.copy_(whole if cut is None else cut.of(whole))


def _draw(name: str, shape: torch.Size, device: torch.device, seed: int) -> Tensor:
    if len(shape) <= 1 and name.endswith("weight"):  # of a normalisation
        return torch.ones(shape, dtype=torch.float32, device=device)
    if len(shape) <= 1 and "lambda" in name:  # layer scale of a vision block
        return torch.full(shape, 0.5, dtype=torch.float32, device=device)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device=device)
    generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    noise = torch.empty(shape, dtype=torch.float32, device=device)
    return noise.normal_(0.0, _std(name, shape), generator=generator)


def _std(name: str, shape: torch.Size) -> float:
    if "position_embed" in name or "pos_embed" in name:
        return POSITION_STD
    if "embed_tokens" in name or "newline" in name or "cls_token" in name:
        return EMBEDDING_STD
    if len(shape) <= 1:
        return BIAS_STD
    # A convolution's fan-in is all but its first dimension; stacked experts keep it last.
    fan_in = math.prod(shape[1:]) if len(shape) > 3 else shape[-1]
    return (HEAD_GAIN if "lm_head" in name else MATRIX_GAIN) / math.sqrt(fan_in)
