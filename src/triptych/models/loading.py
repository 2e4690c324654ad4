"""Loading the half of a model that a role needs, onto its device, in its dtype."""

from __future__ import annotations

import logging
import threading
import warnings
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import is_accelerate_available

from triptych.config import ModelConfig
from triptych.errors import ConfigError, UnsupportedModel
from triptych.models import refusals
from triptych.models.dummy import fill_random
from triptych.models.halves import Half, half_class, half_config
from triptych.models.identity import identity, read_config, resolve_dtype
from triptych.models.language import LanguageModel
from triptych.models.parallel import Cut, cut_head, cut_layers
from triptych.models.quiet import quiet
from triptych.models.stream import drain, settle
from triptych.models.vision import VisionModel
from triptych.ranks import ALONE, Group, Rank

__all__ = ["identity", "load_encoder", "load_language", "rank_device", "resolve_dtype"]

log = logging.getLogger(__name__)
DUMMY_SEED = 0

# The loader changes the process's default dtype and initialisers while it runs.
_one_at_a_time = threading.Lock()


def load_encoder(config: ModelConfig) -> VisionModel:
    """Vision tower and projector.

    Raises UnsupportedModel (with the reason), ConfigError for a device that is not there.
    """
    return VisionModel(_load(config, "encoder"))


def load_language(config: ModelConfig, group: Group | None = None) -> LanguageModel:
    """Decoder, embedding and head; this rank's part of them if there is a ``group``.

    Raises UnsupportedModel (with the reason), ConfigError for a device that is not there.
    """
    if group is None:
        return LanguageModel(_load(config, "language"))
    model = _load(config, "language", group.rank)
    group.meet()  # reading weights takes longer than ranks wait for each other in a forward
    return LanguageModel(model)


def _load(config: ModelConfig, half: Half, rank: Rank = ALONE) -> Any:
    device = _device(config.device)
    checkpoint = read_config(config)
    refusals.check(checkpoint)
    dtype = resolve_dtype(config, checkpoint)
    settle(device)
    if device.type == "cuda":
        _compute_in_full()
        torch.cuda.set_per_process_memory_fraction(config.memory_fraction, device.index or 0)
    settings = half_config(checkpoint, half)
    with _one_at_a_time, quiet():
        if config.load_format == "dummy":
            model = _make_weights(settings, half, dtype, device, rank)
        else:
            # What is cut is read on the host, so that no device needs room for the whole.
            placed = _placed(device) if rank == ALONE else {}
            model = _read_weights(half_class(settings, half), settings, config, dtype, placed)
            if rank != ALONE:
                cut_layers(model, rank)
        if rank != ALONE:
            cut_head(model, rank)
        model.to(device)
    drain(device)  # other threads use the weights on streams of their own
    model.eval().requires_grad_(False)
    size = sum(p.nbytes for p in model.parameters()) / (1 << 20)
    log.info("loaded the %s half of %s: %.0f MiB of %s", half, config.model, size, dtype)
    return model


def _placed(device: torch.device) -> dict[str, Any]:
    """Has the loader make weights where they belong; without accelerate, on the host."""
    if device.type == "cpu" or not is_accelerate_available():
        return {}
    return {"device_map": {"": device}}


def _make_weights(
    settings: Any, half: Half, dtype: torch.dtype, device: torch.device, rank: Rank
) -> Any:
    cuts: dict[str, Cut] = {}

    def constructed(model: Any) -> None:
        if rank != ALONE:  # before memory is taken
            cuts.update(cut_layers(model, rank))

    # From an empty state dict the loader makes every parameter and buffer of the half.
    model = half_class(settings, half, constructed).from_pretrained(
        None, config=settings, state_dict={}, dtype=dtype, **_placed(device)
    )
    model.to(device)
    fill_random(model, DUMMY_SEED, cuts)
    return model


def _read_weights(
    cls: Any, settings: Any, config: ModelConfig, dtype: torch.dtype, placed: dict[str, Any]
) -> Any:
    try:
        model, report = cls.from_pretrained(
            config.model,
            config=settings,
            revision=config.revision,
            dtype=dtype,
            output_loading_info=True,
            **placed,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as exc:
        raise UnsupportedModel(f"cannot load {config.model}: {exc}") from exc
    missing = sorted(report["missing_keys"])
    if missing:
        raise UnsupportedModel(
            f"the weights of {config.model} lack {len(missing)} tensors, {missing[0]} among them"
        )
    return model


def _compute_in_full() -> None:
    """float32 means float32: convolutions would be computed in TF32 by default."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of torch announce another spelling
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False


def rank_device(name: str, rank: int) -> str:
    """Of a rank whose leader computes on ``name``: on CUDA, one of the devices that follow.

    Raises ConfigError for what is not a device's name.
    """
    device = _named(name)
    return name if device.type == "cpu" else f"{device.type}:{(device.index or 0) + rank}"


def _named(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as exc:
        raise ConfigError(f"device {name!r}: {exc}") from exc


def _device(name: str) -> torch.device:
    device = _named(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices")
    return device
