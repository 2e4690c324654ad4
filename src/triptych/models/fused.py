"""Products that share their input, computed as one: fewer launches, and no small matrix alone.

A layer of Transformers has its queries, keys and values, and the gate and what it lets through,
from matrices of their own. Each of those here becomes a part of what one matrix gives: where
layers are compiled, the equal products that a trace then holds are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import Linear, Module

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names, as Transformers' decoders have them, of what one module applies to one input."""


class Part(Module):
    """Outputs ``start .. stop`` of ``whole``, which is called for each of its parts."""

    def __init__(self, whole: Linear, start: int, stop: int) -> None:
        super().__init__()
        self.whole = whole
        self.start, self.stop = start, stop

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., width) to (..., stop - start)."""
        found: Tensor = self.whole(inputs)[..., self.start : self.stop]
        return found


def fuse_products(model: Module) -> int:
    """Join the matrices of every group in ``model``; the number of groups.

    To be called once its weights are there. Where something is hooked to a matrix, or some have a
    bias and some have not, they stay as they are.
    """
    made = 0
    for module in list(model.modules()):
        for names in GROUPS:
            parts: list[Any] = [getattr(module, name, None) for name in names]
            if _can_be_one(parts):
                _join(module, names, parts)
                made += 1
    if made and torch.cuda.is_available():
        torch.cuda.empty_cache()  # of the matrices that were joined
    return made


def _can_be_one(parts: Sequence[Any]) -> bool:
    return (
        all(type(part) is Linear for part in parts)
        and not any(part._forward_hooks or part._forward_pre_hooks for part in parts)
        and len({(part.weight.shape[1], part.weight.dtype) for part in parts}) == 1
        and len({part.bias is None for part in parts}) == 1
    )


def _join(module: Module, names: Sequence[str], parts: Sequence[Linear]) -> None:
    n_out = [part.weight.shape[0] for part in parts]
    has_bias = parts[0].bias is not None
    whole = Linear(parts[0].weight.shape[1], sum(n_out), bias=has_bias, device="meta")
    for name in ("weight", "bias") if has_bias else ("weight",):
        joined = torch.cat([getattr(part, name).detach() for part in parts])
        setattr(whole, name, torch.nn.Parameter(joined, requires_grad=False))
    start = 0
    for name, n in zip(names, n_out, strict=True):
        setattr(module, name, Part(whole, start, start + n))
        start += n


def merge_products(graph: GraphModule) -> GraphModule:
    """``graph``, as Dynamo traced it, with linear maps of one input by one matrix called once."""
    seen: dict[Any, torch.fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target is not torch._C._nn.linear:
            continue
        first = seen.setdefault((node.args, tuple(node.kwargs.items())), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.graph.erase_node(node)
    graph.recompile()
    return graph
