"""Compiled layers: the repeated blocks of a model, one compilation for all of them."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import GraphModule
from torch.nn import Module
from transformers.modeling_layers import GradientCheckpointingLayer

from triptych.models.fused import merge_products

first_forwards = threading.Lock()
"""Held while code may be compiled: the compiler traces by what all threads of the process share, so
no other thread may run a model meanwhile."""


def inductor(graph: GraphModule, inputs: Sequence[Tensor]) -> Any:
    """Inductor, for a trace whose equal products are to be computed once."""
    compiler = importlib.import_module("torch._inductor.compile_fx")  # seconds, if not needed
    return compiler.compile_fx(merge_products(graph), inputs)


def compile_blocks(
    model: Module, folder: Path, backend: str | Callable[..., Any] = inductor
) -> int:
    """Let ``model``'s blocks be compiled, at their first call, for any number of patches.

    Equal blocks share their code. What was compiled is kept in ``folder`` for the next process.
    Returns the number of blocks. A block that cannot be compiled as a whole raises at its call.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder.expanduser().absolute())
    # All repeated blocks of Transformers' models are of this class.
    blocks = [block for block in model.modules() if isinstance(block, GradientCheckpointingLayer)]
    for block in blocks:
        block.compile(dynamic=True, fullgraph=False, backend=backend)
    return len(blocks)
