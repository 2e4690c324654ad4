"""Tensor parallel: every rank holds its part of each layer's matrices, by the model's own plan.

Transformers says for each family how its matrices are cut (``base_model_tp_plan`` of the text
configuration, ``_tp_plan`` of the class). The plan is theirs, applying it is ours: plain slices as
parameters and a sum or a gather behind the module, in every version of Transformers the same, so
that layers can be compiled and captured as they are on one rank.

The embedding stays whole on every rank, whatever the plan says: looking a token up costs nothing,
adding up the ranks' parts would cost a wait in each step.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from triptych.errors import UnsupportedModel
from triptych.ranks import Rank

GATHERED = ("colwise_gather_output", "colwise_rep")
COLUMNS = ("colwise", *GATHERED)
SPLIT_INPUT = ("rowwise_split_input", "rowwise_rep")
ROWS = ("rowwise", *SPLIT_INPUT)
WHOLE = ("replicated_with_grad_allreduce", "embedding_rowwise", "replicate")
PACKED_COLUMNS, SUMMED = "packed_colwise", "moe_tp_experts"
STYLES = (*COLUMNS, *ROWS, *WHOLE, PACKED_COLUMNS, SUMMED)
LAYERS_OF = {"qwen3_vl_text": "qwen3"}
"""Text models for which Transformers has no plan, and the one whose layers they have."""
HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class Cut:
    """One rank's part of a parameter."""

    rank: Rank
    dim: int | None
    """That is cut, from the end; None: the leader has it whole and the others zeros, since all are
    added up."""
    packed: int = 1
    """So many matrices stand one behind the other along ``dim``; each is cut."""

    def of(self, whole: Tensor) -> Tensor:
        if self.dim is None:
            return whole.clone() if self.rank.leads else torch.zeros_like(whole)
        parts = [
            each.chunk(self.rank.size, self.dim)[self.rank.index]
            for each in whole.chunk(self.packed, self.dim)
        ]
        return torch.cat(parts, self.dim)

    def whole(self, shape: torch.Size) -> torch.Size:
        """Of the parameter that ``shape`` is a part of."""
        sizes = list(shape)
        if self.dim is not None:
            sizes[self.dim] *= self.rank.size
        return torch.Size(sizes)


Cuts = Mapping[str, Cut]
"""By the parameter's name."""


# ------------------------------------------------------------------ the group


def join(rank: Rank, store: Path, device: torch.device, timeout_s: float) -> None:
    """Meet the other ranks, which are processes of this host: NCCL on GPUs, gloo on a CPU.

    ``store``: a file that does not exist yet, in a folder that only this user may enter.
    ``timeout_s``: of every collective operation from now on.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{store}",
        rank=rank.index,
        world_size=rank.size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if on_gpu else None,
    )


def leave() -> None:
    """Idempotent."""
    if dist.is_initialized():
        dist.destroy_process_group()


def broadcast(tensor: Tensor) -> None:
    """The leader's content to everybody's ``tensor``; all ranks call it. When it returns the
    leader's memory is not read any more."""
    dist.broadcast(tensor, 0)
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()


def _sum(part: Tensor) -> Tensor:
    """Of all ranks' parts, on each of them; ``part`` is written to."""
    dist.all_reduce(part)
    return part


def _gather(part: Tensor, size: int) -> Tensor:
    """All ranks' parts one behind the other along the last dimension, on each of them."""
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(size)]
    dist.all_gather(parts, part)
    return torch.cat(parts, -1)


# ------------------------------------------------------------------ the plan


def plan(model: Any) -> dict[str, str]:
    """Style of each module and parameter that the plan names, by its full name.

    Raises UnsupportedModel for a model without a plan, or with a style that is not known here.
    """
    decoder = model.model.get_decoder()
    config = decoder.config
    layers = config.base_model_tp_plan
    if not layers and config.model_type in LAYERS_OF:
        layers = CONFIG_MAPPING[LAYERS_OF[config.model_type]].base_model_tp_plan
    if not layers:
        raise UnsupportedModel(f"{type(decoder).__name__} has no plan for tensor parallel")
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    rules = {f"{prefix}.{pattern}": style for pattern, style in layers.items()}
    rules |= getattr(type(model), "_tp_plan", None) or {}
    unknown = sorted(set(rules.values()) - set(STYLES))
    if unknown:
        raise UnsupportedModel(
            f"{type(decoder).__name__}: its plan for tensor parallel has the style {unknown[0]}"
        )
    names = [*dict(model.named_modules()), *dict(model.named_parameters(remove_duplicate=False))]
    found = {}
    for pattern, style in rules.items():
        matches = re.compile(re.escape(pattern).replace(r"\*", r"\d+")).fullmatch
        found.update({name: style for name in names if matches(name)})
    return found


def check_heads(config: Any, rank: Rank) -> None:
    """Raises UnsupportedModel unless every rank can have as many heads as any other.

    ``config``: of the text model.
    """
    for what in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, what, None)
        if heads is not None and heads % rank.size:
            raise UnsupportedModel(
                f"{what} {heads} of {config.model_type} cannot be spread evenly over "
                f"{rank.size} ranks (--tensor-parallel {rank.size})"
            )


def cut_layers(model: Any, rank: Rank) -> Cuts:
    """Leave of every layer's parameters this rank's part, and connect the parts.

    On any device, the meta device included. Raises UnsupportedModel.
    """
    check_heads(model.config.get_text_config(), rank)
    cuts: dict[str, Cut] = {}
    modules = dict(model.named_modules())
    for name, style in plan(model).items():
        if name == HEAD or style in WHOLE:
            continue
        module = modules.get(name)
        if module is None:
            cuts[name] = _cut_parameter(modules, name, style, rank)
        elif style == SUMMED:
            module.register_forward_hook(lambda module, args, output: _sum(output))
        else:
            for part, cut in _cut_linear(module, name, style, rank).items():
                cuts[f"{name}.{part}"] = cut
    return cuts


def cut_head(model: Any, rank: Rank) -> None:
    """As ``cut_layers``, of the head, if the plan cuts it. The last rank's part is filled up where
    the vocabulary cannot be spread evenly.

    After loading: until then it may be tied to the embedding, of which it stays a view.
    """
    if plan(model).get(HEAD) not in GATHERED:
        return
    head = model.get_submodule(HEAD)
    n_words = head.weight.shape[0]
    n_rows = -(-n_words // rank.size)
    for part, parameter in list(head.named_parameters(recurse=False)):
        rows = parameter.detach()[rank.index * n_rows : (rank.index + 1) * n_rows]
        if len(rows) < n_rows:
            rows = torch.cat([rows, rows.new_zeros(n_rows - len(rows), *rows.shape[1:])])
        setattr(head, part, nn.Parameter(rows, requires_grad=False))
    head.register_forward_hook(
        lambda module, args, output: _gather(output, rank.size)[..., :n_words]
    )


def _cut_linear(module: nn.Module, name: str, style: str, rank: Rank) -> dict[str, Cut]:
    """Its parameters' cuts by their names in the module."""
    if not isinstance(module, nn.Linear):
        raise UnsupportedModel(f"{name} is to be cut and is a {type(module).__name__}")
    if style in COLUMNS:
        cuts = {"weight": Cut(rank, -2), "bias": Cut(rank, -1)}
        if style in GATHERED:
            module.register_forward_hook(lambda module, args, output: _gather(output, rank.size))
    else:
        cuts = {"weight": Cut(rank, -1), "bias": Cut(rank, None)}
        if style in SPLIT_INPUT:
            module.register_forward_pre_hook(
                lambda module, args: (args[0].chunk(rank.size, -1)[rank.index],)
            )
        module.register_forward_hook(lambda module, args, output: _sum(output))
    there = [part for part, _ in module.named_parameters(recurse=False)]
    for part in there:
        _replace(module, part, f"{name}.{part}", cuts[part])
    return {part: cuts[part] for part in there}


def _cut_parameter(modules: Mapping[str, nn.Module], name: str, style: str, rank: Rank) -> Cut:
    """Of the stacked matrices of experts."""
    packed = style == PACKED_COLUMNS
    cut = Cut(rank, -2, packed=2) if packed else Cut(rank, -1 if style in ROWS else -2)
    owner, _, part = name.rpartition(".")
    _replace(modules[owner], part, name, cut)
    return cut


def _replace(module: nn.Module, part: str, name: str, cut: Cut) -> None:
    whole = getattr(module, part).detach()
    if cut.dim is not None and whole.shape[cut.dim] % (cut.packed * cut.rank.size):
        raise UnsupportedModel(
            f"{name}: {whole.shape[cut.dim] // cut.packed} rows or columns cannot be spread evenly "
            f"over {cut.rank.size} ranks (--tensor-parallel {cut.rank.size})"
        )
    setattr(module, part, nn.Parameter(cut.of(whole), requires_grad=False))
