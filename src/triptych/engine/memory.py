"""How much of a GPU the KV cache takes, where roles share it."""

from __future__ import annotations

import logging

import torch

from triptych.config import MIB, EngineConfig
from triptych.engine.backends import Compute, choose, longest
from triptych.engine.flash_steps import LONGEST_COPY
from triptych.engine.kv_cache import KVShape
from triptych.errors import ConfigError
from triptych.models.language import LanguageModel

logger = logging.getLogger(__name__)

MARGIN_NBYTES = 512 * MIB
"""Of the share, for what no forward shows: captured decode steps, sampling, pieces that the
allocator cannot use."""


def kv_nbytes(model: LanguageModel, config: EngineConfig, share: float, landing_nbytes: int) -> int:
    """Bytes of KV cache: what is configured, or what ``share`` of the device's memory leaves
    besides what this process has taken, ``landing_nbytes`` and a step's intermediate results.

    Raises ConfigError when nothing is left, or on a device whose memory is not shared out.
    """
    if config.kv_mib:
        return config.kv_mib * MIB
    if model.device.type != "cuda":
        raise ConfigError(
            f"--kv-mib 0 needs a GPU, whose memory it shares out; not a {model.device.type}"
        )
    step = step_nbytes(model, config)
    total = torch.cuda.get_device_properties(model.device).total_memory
    taken = torch.cuda.memory_reserved(model.device)
    left = int(share * total) - taken - step - landing_nbytes - MARGIN_NBYTES
    logger.info(
        "of %d MiB, %.0f %% for this process: %d MiB are taken, %d MiB for a step, %d MiB for the "
        "KV cache", total // MIB, 100 * share, taken // MIB, step // MIB, left // MIB,
    )  # fmt: skip
    if left < MIB:
        raise ConfigError(
            f"--memory-fraction {share:g} of {total // MIB} MiB leaves nothing for the KV cache: "
            f"{taken // MIB} MiB are taken and a step of {config.step_tokens('cuda')} tokens takes "
            f"{step // MIB} MiB"
        )
    return left // MIB * MIB


def step_nbytes(model: LanguageModel, config: EngineConfig) -> int:
    """What the largest step takes besides weights and KV cache: measured, by one forward whose
    layers are not compiled, which takes no less than compiled ones. It begins a prompt; what a
    chunk of a long one copies of its keys and values, one while the last is still there, is added.
    """
    n_tokens = min(config.step_tokens(model.device.type), model.max_positions)
    shape = KVShape(model.num_layers, model.num_kv_heads, model.head_dim, model.dtype)
    n_blocks = -(-n_tokens // config.block_size) + 1
    memory = torch.zeros(
        n_blocks * shape.block_nbytes(config.block_size), dtype=torch.uint8, device=model.device
    )
    torch.cuda.synchronize(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    compute = Compute(model, memory, config, n_tokens)
    with torch.compiler.set_stance("force_eager"):
        compute.runner.warm_up(n_tokens, config.block_size)
    torch.cuda.synchronize(model.device)
    taken = torch.cuda.max_memory_allocated(model.device) - before
    del compute, memory
    torch.cuda.empty_cache()
    if choose(model, config) == "flashinfer":
        copied = min(longest(model, config), LONGEST_COPY)
        taken += 2 * copied * shape.block_nbytes(1) // shape.num_layers
    return taken
