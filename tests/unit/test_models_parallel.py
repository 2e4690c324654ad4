"""How a model is cut for tensor parallel: its plan, its parts, and what cannot be cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.conftest import TinyModel
from triptych.config import ModelConfig
from triptych.errors import ConfigError, UnsupportedModel
from triptych.models.loading import load_language, rank_device
from triptych.models.parallel import (
    COLUMNS,
    ROWS,
    WHOLE,
    Cut,
    check_heads,
    cut_head,
    cut_layers,
    plan,
)
from triptych.ranks import Rank

RANKS = (Rank(0, 2), Rank(1, 2))


class Alone:
    """A rank whose others are not there: it may load, its first forward would wait for them."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank

    def meet(self) -> None:
        raise InterruptedError


@pytest.mark.parametrize("packed", [1, 2])
@pytest.mark.parametrize("dim", [-1, -2])
def test_the_parts_of_a_matrix(dim: int, packed: int) -> None:
    whole = torch.arange(3 * 8 * 12.0).view(3, 8, 12)
    parts = [Cut(rank, dim, packed).of(whole) for rank in RANKS]
    assert all(Cut(RANKS[0], dim, packed).whole(part.shape) == whole.shape for part in parts)
    joined = [torch.cat([part.chunk(packed, dim)[i] for part in parts], dim) for i in range(packed)]
    torch.testing.assert_close(torch.cat(joined, dim), whole)


def test_what_is_added_up_is_there_once() -> None:
    bias = torch.arange(4.0)
    parts = [Cut(rank, None).of(bias) for rank in RANKS]
    torch.testing.assert_close(parts[0] + parts[1], bias)
    assert Cut(RANKS[1], None).whole(bias.shape) == bias.shape


def test_every_family_has_a_plan(tiny: TinyModel) -> None:
    """All matrices of all layers are cut, and nothing of what is between them."""
    found = plan(tiny.whole)
    decoder = tiny.whole.model.get_decoder()
    linears = {
        name
        for name, module in tiny.whole.named_modules()
        if isinstance(module, nn.Linear) and module in set(decoder.layers.modules())
    }
    assert len(linears) >= 4 * 4
    assert all(found[name] in (*COLUMNS, *ROWS) for name in linears)
    others = {name: style for name, style in found.items() if name not in linears}
    between = {style for name, style in others.items() if "norm" in name or "embed" in name}
    assert between <= set(WHOLE)


class Text(nn.Module):
    """Stands for a decoder with one projection, and for the model around it."""

    def __init__(self, styles: dict[str, str], rows: int = 8, kind: str = "made_up") -> None:
        super().__init__()
        self.config: Any = type("Config", (), {})()
        self.config.model_type = kind
        self.config.base_model_tp_plan = styles
        self.config.num_attention_heads = 4
        self.config.num_key_value_heads = None
        self.config.get_text_config = lambda: self.config
        self.proj = nn.Linear(6, rows)
        self.table = nn.Embedding(4, 6)
        self.get_decoder = lambda: self

    @property
    def model(self) -> Text:
        return self


class Outer(nn.Module):
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, text: Text, words: int = 10) -> None:
        super().__init__()
        self.model = text
        self.config = text.config
        self.lm_head = nn.Linear(6, words, bias=False)


def test_a_model_without_a_plan_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="Text has no plan for tensor parallel"):
        plan(Outer(Text({})))


def test_a_style_that_is_not_known_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="has the style mla_kv_a_proj"):
        plan(Outer(Text({"proj": "mla_kv_a_proj"})))


def test_a_matrix_that_cannot_be_cut_evenly_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"model\.proj.*7 rows or columns.*2 ranks"):
        cut_layers(Outer(Text({"proj": "colwise"}, rows=7)), RANKS[0])


def test_a_module_that_is_no_matrix_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"model\.table is to be cut and is a Embedding"):
        cut_layers(Outer(Text({"table": "colwise"})), RANKS[0])


def test_the_bias_of_what_is_added_up_is_the_leaders() -> None:
    models = [Outer(Text({"proj": "rowwise"})) for _ in RANKS]
    before = models[0].model.proj.bias.detach().clone()
    for model, rank in zip(models, RANKS, strict=True):
        assert cut_layers(model, rank).keys() == {"model.proj.weight", "model.proj.bias"}
    torch.testing.assert_close(models[0].model.proj.bias.detach(), before)
    assert not models[1].model.proj.bias.any()
    assert models[0].model.proj.weight.shape == (8, 3)


def test_a_head_is_cut_by_rows_and_stays_tied() -> None:
    model = Outer(Text({"proj": "colwise"}))
    weight = model.lm_head.weight
    cut_head(model, RANKS[1])
    assert model.lm_head.weight.data_ptr() == weight[5:].data_ptr()
    assert model.lm_head.weight.shape == (5, 6)


def test_a_head_of_an_odd_vocabulary_is_filled_up() -> None:
    models = [Outer(Text({"proj": "colwise"}), words=11) for _ in RANKS]
    whole = models[1].lm_head.weight.detach().clone()
    for model, rank in zip(models, RANKS, strict=True):
        cut_head(model, rank)
        assert model.lm_head.weight.shape == (6, 6)
    assert torch.equal(models[1].lm_head.weight[:5], whole[6:])
    assert not models[1].lm_head.weight[5].any()


def test_a_head_that_the_plan_does_not_name_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Outer, "_tp_plan", None)
    model = Outer(Text({"proj": "colwise"}))
    weight = model.lm_head.weight
    cut_head(model, RANKS[1])
    assert model.lm_head.weight is weight


def test_what_stands_on_every_rank_stays() -> None:
    model = Outer(Text({"table": "embedding_rowwise", "proj": "replicated_with_grad_allreduce"}))
    assert cut_layers(model, RANKS[1]) == {}
    assert model.model.table.weight.shape == (4, 6) and model.model.proj.weight.shape == (8, 6)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "what"),
    [(6, 3, "num_key_value_heads 3"), (5, 5, "num_attention_heads 5")],
)
def test_heads_that_do_not_divide_are_refused(heads: int, kv_heads: int, what: str) -> None:
    config = Text({}, kind="qwen2").config
    config.num_attention_heads, config.num_key_value_heads = heads, kv_heads
    with pytest.raises(UnsupportedModel, match=rf"{what} of qwen2 .* over 2 ranks"):
        check_heads(config, RANKS[0])


def test_a_model_is_refused_before_its_ranks_wait_for_each_other(
    tiny_models: Callable[[str], TinyModel], tmp_path: Path
) -> None:
    tiny = tiny_models("qwen3_vl")
    for file in tiny.folder.iterdir():
        if not file.name.endswith(".safetensors"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"].update(num_attention_heads=3, num_key_value_heads=3)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"heads 3 of qwen3_vl_text .* 2 ranks"):
        load_language(ModelConfig(str(tmp_path), load_format="dummy"), Alone(RANKS[1]))


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_the_ranks_parts_are_those_of_the_whole(
    tiny: TinyModel, load_format: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the parts are read, or made before the whole ever was."""
    made: list[dict[str, Tensor]] = []

    def see(model: Any) -> Any:
        made.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return model

    monkeypatch.setattr("triptych.models.loading.LanguageModel", see)
    config = ModelConfig(str(tiny.folder), load_format=load_format)
    load_language(config)
    for rank in RANKS:
        alone = Alone(rank)
        monkeypatch.setattr(alone, "meet", lambda: None)
        load_language(config, alone)
    whole, *parts = made
    assert whole.keys() == parts[0].keys() == parts[1].keys()
    cut = 0
    for name, tensor in whole.items():
        pair = [part[name] for part in parts]
        if pair[0].shape == tensor.shape:
            assert torch.equal(pair[0], tensor) and torch.equal(pair[1], tensor)
            continue
        cut += 1
        dim = next(d for d in range(tensor.ndim) if pair[0].shape[d] != tensor.shape[d])
        packed = 2 if name.endswith("experts.gate_up_proj") else 1
        halves = [part.chunk(packed, dim) for part in pair]
        joined = torch.cat([half[i] for i in range(packed) for half in halves], dim)
        joined = joined.narrow(dim, 0, tensor.shape[dim])  # the head is filled up
        assert torch.equal(joined, tensor), name
    assert cut > 4 * 6, "the matrices of the layers, and the head"


def test_the_devices_of_the_ranks() -> None:
    assert [rank_device("cpu", i) for i in range(2)] == ["cpu", "cpu"]
    assert [rank_device("cuda", i) for i in range(2)] == ["cuda:0", "cuda:1"]
    assert [rank_device("cuda:2", i) for i in range(2)] == ["cuda:2", "cuda:3"]
    with pytest.raises(ConfigError, match="device 'gpu'"):
        rank_device("gpu", 0)
