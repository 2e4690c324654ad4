"""Matrices of one input, joined: the same outputs; what must stay apart does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import Linear, Module

from triptych.models.fused import Part, fuse_products, merge_products


class Attention(Module):
    def __init__(self, bias: bool = True, key_bias: bool = True, width: int = 8) -> None:
        super().__init__()
        self.q_proj = Linear(8, 12, bias=bias)
        self.k_proj = Linear(8, 4, bias=key_bias)
        self.v_proj = Linear(width, 4, bias=bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


@pytest.mark.parametrize("bias", [True, False])
def test_parts_give_what_the_matrices_gave(bias: bool) -> None:
    plain = Attention(bias, bias)
    fused = copy.deepcopy(plain)
    assert fuse_products(fused) == 1
    assert isinstance(fused.k_proj, Part)
    x = torch.randn(2, 3, 8)
    for found, wanted in zip(fused(x), plain(x), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert fuse_products(fused) == 0


def test_what_is_not_alike_stays_apart() -> None:
    hooked = Attention()
    hooked.v_proj.register_forward_hook(lambda module, args, output: 2 * output)
    for apart in (Attention(key_bias=False), Attention(width=9), hooked):
        assert fuse_products(apart) == 0
        assert type(apart.q_proj) is Linear


def test_only_products_of_the_same_input_are_merged() -> None:
    module = Attention()
    fuse_products(module)

    class Two(Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return sum(part.sum() for part in (*self.inner(x), *self.inner(y)))

    x, y = torch.randn(3, 8), torch.randn(3, 8)
    found: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        merged = merge_products(graph)
        found.append(sum(n.target is torch._C._nn.linear for n in merged.graph.nodes))
        return merged.forward

    two = Two()
    wanted = two(x, y)
    torch.testing.assert_close(torch.compile(two, backend=backend)(x, y), wanted)
    assert found == [2]
    torch.compiler.reset()
