"""What model a worker serves: its configuration, its name and fingerprint, its dtype."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from triptych.config import ModelConfig
from triptych.errors import UnsupportedModel
from triptych.wire import ModelIdentity

SAMPLE_NBYTES = 1 << 16
"""Bytes of a weight file's beginning and end that the fingerprint covers."""
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "_commit_hash")


def read_config(config: ModelConfig) -> PreTrainedConfig:
    """The checkpoint's configuration. Raises UnsupportedModel if there is none to be read."""
    try:
        return AutoConfig.from_pretrained(
            config.model, revision=config.revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, StrictDataclassError) as exc:
        raise UnsupportedModel(f"cannot read the configuration of {config.model}: {exc}") from exc


def resolve_dtype(config: ModelConfig, checkpoint: PreTrainedConfig) -> torch.dtype:
    """The dtype to compute in: the one asked for, else float32 on CPU, else the checkpoint's."""
    if config.dtype != "auto":
        return _dtype(config.dtype)
    if torch.device(config.device).type == "cpu":
        return torch.float32
    named = checkpoint.dtype or checkpoint.get_text_config().dtype or torch.bfloat16
    return _dtype(named) if isinstance(named, str) else named


def identity(config: ModelConfig, processor: str) -> ModelIdentity:
    """``processor``: the image backend (``Processor.backend``). Reads no weights but samples."""
    checkpoint = read_config(config)
    return msgspec.structs.replace(
        _configured(config, checkpoint),
        fingerprint=_digest((_settings(checkpoint), *_weights(config, checkpoint))),
        dtype=str(resolve_dtype(config, checkpoint)).removeprefix("torch."),
        processor=processor,
    )


def router_identity(config: ModelConfig) -> ModelIdentity:
    """Of who has a checkpoint's tokenizer and perhaps not its weights."""
    return _configured(config, read_config(config))


def _configured(config: ModelConfig, checkpoint: PreTrainedConfig) -> ModelIdentity:
    return ModelIdentity(
        name=config.model.rstrip("/").rsplit("/", 1)[-1],
        fingerprint="",
        dtype="",
        processor="",
        configuration=_digest((_settings(checkpoint),)),
        revision=str(getattr(checkpoint, "_commit_hash", None) or ""),
    )


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def _settings(checkpoint: PreTrainedConfig) -> bytes:
    settings = {k: v for k, v in checkpoint.to_dict().items() if k not in NOT_THE_MODEL}
    return json.dumps(settings, sort_keys=True, default=str).encode()


def _weights(config: ModelConfig, checkpoint: PreTrainedConfig) -> Iterator[bytes]:
    if config.load_format == "dummy":
        yield b"dummy"
        return
    folder = Path(config.model)
    if not folder.is_dir():  # a hub name: its commit says it all
        yield str(getattr(checkpoint, "_commit_hash", None)).encode()
        return
    for path in sorted(folder.glob("*.safetensors*")):
        size = path.stat().st_size
        yield f"{path.name}:{size}".encode()
        with path.open("rb") as file:
            yield file.read(SAMPLE_NBYTES)
            file.seek(max(0, size - SAMPLE_NBYTES))
            yield file.read()


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
