"""Halves of a checkpoint, dummy weights, identity, and checkpoints that cannot be loaded."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.unit.conftest import TinyModel, picture
from triptych.config import ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.errors import ConfigError, UnsupportedModel
from triptych.models import loading
from triptych.models.dummy import fill_random
from triptych.models.loading import identity, load_encoder, load_language, resolve_dtype

Parameters = dict[str, torch.Tensor]


def parameters(config: ModelConfig, half: Any) -> Parameters:
    return dict(loading._load(config, half).named_parameters())


def test_halves_sum_to_the_whole(tiny: TinyModel) -> None:
    whole = dict(tiny.whole.named_parameters())
    encoder, language = (parameters(tiny.config, half) for half in ("encoder", "language"))
    assert encoder.keys() | language.keys() == whole.keys()
    newline = {"model.image_newline"} if tiny.family in ("llava_next", "llava_onevision") else set()
    assert encoder.keys() & language.keys() == newline
    for name, value in (encoder | language).items():
        assert torch.equal(value, whole[name]), name
        assert not value.requires_grad
    assert not any("language_model" in name or "lm_head" in name for name in encoder)


def test_dummy_halves_are_halves_of_one_model(tiny: TinyModel) -> None:
    """Equal whichever half is loaded, and equal to the whole model filled alike."""
    config = replace(tiny.config, load_format="dummy")
    whole = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tiny.folder))
    fill_random(whole, loading.DUMMY_SEED)
    expected = dict(whole.named_parameters())
    halves = parameters(config, "encoder") | parameters(config, "language")
    assert halves.keys() == expected.keys()
    for name, value in halves.items():
        assert torch.equal(value, expected[name]), name


def test_dummy_needs_only_a_configuration(tiny: TinyModel, tmp_path: Path) -> None:
    shutil.copy(tiny.folder / "config.json", tmp_path)
    config = ModelConfig(str(tmp_path), load_format="dummy")
    language = load_language(config)
    embeds = language.embed(torch.arange(8))
    positions, _ = language.positions(list(range(8)), [])
    logits = language.reference_logits(embeds, positions)
    assert logits.isfinite().all() and logits.std() > 1
    assert language.eos_ids == {tiny.whole.config.get_text_config().eos_token_id}
    (rows,) = load_encoder(config).encode(tiny.items([picture(1)]))
    assert rows.isfinite().all() and rows.std() > 0.1


def test_dummy_bfloat16_is_rounded_float32(tiny_models: Callable[[str], TinyModel]) -> None:
    config = replace(tiny_models("internvl").config, load_format="dummy")
    high = parameters(config, "language")
    low = parameters(replace(config, dtype="bfloat16"), "language")
    assert all(torch.equal(value, high[name].bfloat16()) for name, value in low.items())


def test_tied_head(tmp_path: Path) -> None:
    """Checkpoints with a tied head hold no head; both halves load, the head is the embedding."""
    folder = make_tiny_model(tmp_path, "qwen2_5_vl")
    settings = json.loads((folder / "config.json").read_text())
    settings["tie_word_embeddings"] = settings["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(settings))
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = ModelConfig(str(folder))
    load_encoder(config)
    language = load_language(config)
    hidden = torch.randn(2, 64)
    embedding = weights["model.embed_tokens.weight"]
    torch.testing.assert_close(language.logits(hidden), hidden @ embedding.T)


def test_other_names_of_the_same_tensors(
    tiny_models: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    """Hub checkpoints have the names of older model classes, newer ones those of today's."""
    tiny = tiny_models("qwen2_5_vl")
    shutil.copytree(tiny.folder, tmp_path, dirs_exist_ok=True)
    current = {name: value.clone() for name, value in tiny.whole.state_dict().items()}
    assert current.keys() != load_file(tiny.folder / "model.safetensors").keys()
    save_file(current, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = ModelConfig(str(tmp_path))
    for name, value in (parameters(config, "encoder") | parameters(config, "language")).items():
        assert torch.equal(value, current[name])


def test_several_files(tiny_models: Callable[[str], TinyModel], tmp_path: Path) -> None:
    tiny = tiny_models("qwen3_vl")
    tiny.whole.save_pretrained(tmp_path, max_shard_size="400KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    items = tiny.items([picture(1)])
    (rows,) = load_encoder(ModelConfig(str(tmp_path))).encode(items)
    assert torch.equal(rows, tiny.encoder.encode(items)[0])


def test_missing_tensors_are_refused(
    tiny_models: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    """Transformers would fill them with random numbers and go on."""
    tiny = tiny_models("internvl")
    shutil.copytree(tiny.folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tiny.folder / "model.safetensors")
    for name in ("language_model.lm_head.weight", "multi_modal_projector.linear_1.weight"):
        del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = ModelConfig(str(tmp_path))
    with pytest.raises(UnsupportedModel, match=r"lack 1 tensors, lm_head\.weight"):
        load_language(config)
    with pytest.raises(UnsupportedModel, match=r"lack 1 tensors, .*linear_1\.weight"):
        load_encoder(config)


@pytest.mark.parametrize("load", [load_encoder, load_language])
def test_folders_that_are_no_model(load: Callable[[ModelConfig], object], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="configuration"):
        load(ModelConfig(str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(UnsupportedModel, match="no_such_model"):
        load(ModelConfig(str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "internvl", "image_token_id": "x"}')
    with pytest.raises(UnsupportedModel, match="image_token_id"):
        load(ModelConfig(str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedModel, match="cannot read the configuration"):
        load(ModelConfig(str(tmp_path)))


def test_folder_without_weights(tiny: TinyModel, tmp_path: Path) -> None:
    shutil.copy(tiny.folder / "config.json", tmp_path)
    with pytest.raises(UnsupportedModel, match="cannot load"):
        load_encoder(ModelConfig(str(tmp_path)))


def test_weights_that_are_damaged(tiny_models: Callable[[str], TinyModel], tmp_path: Path) -> None:
    tiny = tiny_models("internvl")
    shutil.copytree(tiny.folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(UnsupportedModel, match="cannot load"):
        load_language(ModelConfig(str(tmp_path)))


@pytest.mark.parametrize("device", ["cuda:99", "no_such_device"])
def test_device_that_is_not_there(tiny_models: Callable[[str], TinyModel], device: str) -> None:
    with pytest.raises(ConfigError, match=device):
        load_encoder(replace(tiny_models("internvl").config, device=device))


def test_resolve_dtype(tiny_models: Callable[[str], TinyModel]) -> None:
    config = tiny_models("internvl").config
    checkpoint = AutoConfig.from_pretrained(config.model)
    checkpoint.dtype = torch.bfloat16
    assert resolve_dtype(config, checkpoint) == torch.float32
    assert resolve_dtype(replace(config, device="cuda"), checkpoint) == torch.bfloat16
    asked = replace(config, device="cuda", dtype="float16")
    assert resolve_dtype(asked, checkpoint) == torch.float16


def test_identity(tiny_models: Callable[[str], TinyModel], tmp_path: Path) -> None:
    tiny = tiny_models("qwen3_vl")
    first = identity(tiny.config, "pil")
    assert (first.name, first.dtype, first.processor) == ("qwen3_vl", "float32", "pil")
    copy = tmp_path / "elsewhere" / "qwen3_vl"
    shutil.copytree(tiny.folder, copy)
    assert identity(ModelConfig(f"{copy}/"), "pil") == first
    others = [
        identity(tiny.config, "torchvision"),
        identity(replace(tiny.config, dtype="bfloat16"), "pil"),
        identity(replace(tiny.config, load_format="dummy"), "pil"),
        identity(ModelConfig(str(make_tiny_model(tmp_path / "qwen3_vl", seed=1))), "pil"),
    ]
    assert len({first, *others}) == 5
    settings = json.loads((copy / "config.json").read_text())
    settings["text_config"]["rms_norm_eps"] = 1e-5
    (copy / "config.json").write_text(json.dumps(settings))
    assert identity(ModelConfig(str(copy)), "pil").fingerprint != first.fingerprint


def test_loading_is_quiet_but_logged(
    tiny_models: Callable[[str], TinyModel],
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = tiny_models("internvl").config
    with caplog.at_level(logging.INFO, "triptych"):
        load_encoder(replace(config, load_format="dummy"))
        load_language(config)
    out, err = capfd.readouterr()
    assert "LOAD REPORT" not in out + err and "Loading weights" not in out + err
    assert "loaded the encoder half" in caplog.text and "loaded the language half" in caplog.text
