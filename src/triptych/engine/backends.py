"""Which attention an engine computes with, and what that needs before the first request."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import time

import torch
from torch import Tensor

from triptych.config import EngineConfig, ModelConfig
from triptych.engine.attention import Attention, SdpaAttention
from triptych.engine.kv_cache import KVCache, KVShape
from triptych.engine.mirror import Followers, LeadingRunner
from triptych.engine.runner import Runner
from triptych.errors import ConfigError
from triptych.models.language import LanguageModel

logger = logging.getLogger(__name__)
FLASH_DTYPES = (torch.float16, torch.bfloat16)
HOPPER = 9
"""Major compute capability of GPUs whose kernels read keys and values in large tiles."""
WARM_UP_TOKENS = 64
"""Of a second forward, so that compiled code is seen to serve another number of tokens."""


def choose(model: LanguageModel, config: EngineConfig) -> str:
    """ "flashinfer" or "sdpa". Raises ConfigError if what was asked for cannot be had."""
    if config.attention == "sdpa":
        return "sdpa"
    reason = ""
    if model.device.type != "cuda":
        reason = f"the model is on {model.device.type}"
    elif model.dtype not in FLASH_DTYPES:
        reason = f"it has no kernels for {model.dtype}"
    elif model.longest_run:
        reason = "its images attend in both directions"
    elif importlib.util.find_spec("flashinfer") is None:
        reason = "flashinfer is not installed (triptych[cuda])"
    elif model.head_dim not in importlib.import_module("triptych.engine.flash_attention").HEAD_DIMS:
        reason = f"it has no kernels for heads of {model.head_dim}"
    if reason and config.attention == "flashinfer":
        raise ConfigError(f"--attention flashinfer: {reason}")
    if reason and model.device.type == "cuda":
        logger.warning("attention by torch, sequence by sequence, not by FlashInfer: %s", reason)
    return "sdpa" if reason else "flashinfer"


def open_attention(name: str, kv: KVCache, places: int, max_blocks: int) -> Attention:
    """``name`` as from ``choose``; the rest as for ``SdpaAttention``."""
    if name == "sdpa":
        return SdpaAttention(kv, places, max_blocks)
    kernels = importlib.import_module("flashinfer")
    write = importlib.import_module("triptych.engine.kv_write").write
    flash = importlib.import_module("triptych.engine.flash_attention")
    hopper = torch.cuda.get_device_capability(kv.device)[0] == HOPPER
    dense = flash.LARGE_CHUNK if hopper else 0
    found: Attention = flash.FlashAttention(
        kv, places, max_blocks, kv.n_blocks - 1, kernels, write, dense
    )
    return found


def compile_layers(model: LanguageModel, engine: EngineConfig, config: ModelConfig) -> None:
    """Let the model's layers be compiled where its attention allows that. Compiled code, that of
    FlashInfer too, is kept in ``config.compile_cache``."""
    if choose(model, engine) == "flashinfer" and config.compile:
        folder = config.compile_cache.expanduser().absolute()
        os.environ.setdefault("FLASHINFER_WORKSPACE_BASE", str(folder))
        model.compile(folder)


def longest(model: LanguageModel, config: EngineConfig) -> int:
    """Tokens of the longest prompt plus answer, as far as the cache does not limit them."""
    return min(config.max_model_len or model.max_positions, model.max_positions)


class Compute:
    """What an engine computes with: the cache, the attention over it, the runner of its steps.

    ``kv_memory``: as for ``Engine``. ``n_positions``: tokens that no sequence exceeds.
    ``followers``: the other ranks, if there are any and this one leads them. Raises ConfigError if
    the cache has no room for a block, or a step none for the longest run.
    """

    def __init__(
        self,
        model: LanguageModel,
        kv_memory: Tensor,
        config: EngineConfig,
        n_positions: int,
        followers: Followers | None = None,
    ) -> None:
        step_tokens = config.step_tokens(model.device.type)
        if step_tokens < model.longest_run:
            raise ConfigError(
                f"--chunk-tokens {step_tokens}: the model computes the "
                f"{model.longest_run} rows of an image at once"
            )
        shape = KVShape(model.num_layers, model.num_kv_heads, model.head_dim, model.dtype)
        name = choose(model, config)
        alone = followers is None and config.tensor_parallel == 1
        if config.run_ahead == "on" and not alone:
            raise ConfigError("--run-ahead on: ranks that follow are told the tokens of each step")
        self.model = model
        self.runs_ahead = alone and config.run_ahead != "off"
        self.runs_ahead &= config.run_ahead == "on" or model.compiled
        """A decode step may be launched before the one before it has been read."""
        self.kv = KVCache(kv_memory, shape, config.block_size)
        self.n_blocks = self.kv.n_blocks - (name == "flashinfer")
        """For sequences. One is left for what a captured step computes in vain."""
        if self.n_blocks < 1:
            raise ConfigError("the KV cache has no room for one block besides that of idle places")
        self._places = min(config.max_sequences, step_tokens)
        n_tokens = min(n_positions, self.n_blocks * config.block_size)
        self._chunk_tokens = min(step_tokens, n_tokens)
        self._attention = open_attention(
            name, self.kv, self._places, -(-n_tokens // config.block_size)
        )
        if followers is None:
            self.runner = Runner(model, self._attention, self._places)
        else:
            self.runner = LeadingRunner(model, self._attention, self._places, followers)

    def warm_up(self) -> None:
        """On the thread that will compute, once it has settled: compile for the most tokens at
        once, then see that the same code serves fewer. Torch's own attention needs none of it."""
        if isinstance(self._attention, SdpaAttention):
            return
        began = time.perf_counter()
        for n_tokens in (self._chunk_tokens, min(self._chunk_tokens, WARM_UP_TOKENS)):
            self.runner.warm_up(n_tokens, self.kv.block_size)
        torch.cuda.synchronize(self.model.device)
        logger.info("the first forwards took %.1f s", time.perf_counter() - began)

    def capture(self) -> None:
        """Decode steps as CUDA graphs, where the layers are compiled. After ``warm_up``."""
        if self.model.compiled:
            began = time.perf_counter()
            graphs = importlib.import_module("triptych.engine.graphs")
            self.runner.graphs = graphs.DecodeGraphs(
                self.model, self._attention, self._places, foresees=not self.runs_ahead
            )
            logger.info("capturing decode steps took %.1f s", time.perf_counter() - began)
