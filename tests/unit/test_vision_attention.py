"""One attention call per layer against the tower's own call per image and per window."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Conv3d
from torch.nn.functional import scaled_dot_product_attention

from tests.unit.conftest import TinyModel, picture
from triptych.encoder.runner import warm_up_batches
from triptych.media.processor import Processor
from triptych.models import vision_attention
from triptych.models.compiled import compile_blocks
from triptych.models.loading import load_encoder
from triptych.models.patches import PatchProjection, project_patches
from triptych.models.vision import VisionModel
from triptych.models.vision_attention import ends_of, packed_attention

PACKED = ("qwen2_5_vl", "qwen3_vl")
PACKED_TOO = ("glm4v", "mistral3", "pixtral", "qwen2_vl")
SIZES = [(160, 120), (90, 200), (160, 120), (300, 100), (448, 448), (56, 60)]
IMAGES = [picture(seed, *size) for seed, size in enumerate(SIZES)]


def reference(tiny: TinyModel, items: list[dict[str, Tensor]]) -> list[Tensor]:
    """(planes, rows, width) of each item, by a forward of its own of the untouched model."""
    embeddings = []
    for item in items:
        with torch.no_grad():
            output = tiny.whole.model.get_image_features(**item, return_dict=True)
        planes = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
        embeddings.append(torch.stack([p if isinstance(p, Tensor) else p[0] for p in planes]))
    return embeddings


class Calls:
    """Counts the attention calls of a forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sequences: list[int] = []
        original = vision_attention._by_length

        def counted(q: Tensor, k: Tensor, v: Tensor, ends: tuple[int, ...], scale: float) -> Tensor:
            self.sequences.append(len(ends) - 1)
            return original(q, k, v, ends, scale)

        monkeypatch.setattr(vision_attention, "_by_length", counted)


@pytest.mark.parametrize("family", PACKED + PACKED_TOO)
def test_images_of_different_sizes_make_one_call_per_layer(
    family: str, tiny_models: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny, calls = tiny_models(family), Calls(monkeypatch)
    items = tiny.items(IMAGES)
    embeddings = tiny.encoder.encode(items)
    for found, wanted in zip(embeddings, reference(tiny, items), strict=True):
        torch.testing.assert_close(
            found, wanted, atol=1e-6 if family in PACKED else 5e-5, rtol=1e-5
        )
    tower = tiny.whole.config.vision_config
    layers = getattr(tower, "depth", None) or tower.num_hidden_layers
    assert len(calls.sequences) == layers
    windows = max(calls.sequences)
    assert min(calls.sequences) == len(IMAGES)  # one sequence an image where there are no windows
    assert windows > 64 if family == "qwen2_5_vl" else windows == len(IMAGES)


@pytest.mark.parametrize("family", PACKED)
def test_the_tower_is_given_what_it_would_have_computed(
    family: str, tiny_models: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_models(family)
    items = tiny.items(IMAGES)
    ours = tiny.encoder.encode(items)
    tables = tiny.encoder._tables
    assert tables is not None
    assert tables._frame.cache_info().hits > 0
    arguments: dict[str, Any] = {}
    monkeypatch.setattr(tables, "arguments", lambda grids: arguments)
    for found, wanted in zip(ours, tiny.encoder.encode(items), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("family", PACKED)
def test_a_grid_of_several_frames(
    family: str, tiny_models: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a video is to a tower."""
    tiny = tiny_models(family)
    pixels = torch.randn(3 * 8 * 6, tiny.items(IMAGES[:1])[0]["pixel_values"].shape[1])
    items = [{"pixel_values": pixels, "image_grid_thw": torch.tensor([[3, 8, 6]])}]
    (found,), (wanted,) = tiny.encoder.encode(items), reference(tiny, items)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_towers_that_batch_their_crops_are_left_alone(
    tiny_models: Callable[[str], TinyModel],
) -> None:
    for family in ("llava_onevision", "internvl"):
        assert tiny_models(family).encoder._tables is None


def test_patches_go_through_a_matrix_product(tiny_models: Callable[[str], TinyModel]) -> None:
    for family in PACKED:
        tiny = tiny_models(family)
        tower = load_encoder(tiny.config)._model.model.visual
        pixels = tiny.items(IMAGES[:1])[0]["pixel_values"]
        expected = tower.patch_embed(pixels)
        assert isinstance(tower.patch_embed.proj, Conv3d)
        project_patches(tower)
        assert isinstance(tower.patch_embed.proj, PatchProjection)
        torch.testing.assert_close(tower.patch_embed(pixels), expected, atol=1e-5, rtol=1e-5)


@given(st.lists(st.sampled_from([1, 2, 2, 3, 4, 4, 4, 7, 16]), min_size=1, max_size=30))
def test_any_mixture_of_lengths(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(len(lengths))
    q, k, v = torch.randn(3, sum(lengths), 2, 8, generator=generator)
    found = packed_attention(q, k, v, ends_of(lengths), max(lengths), 0.5)
    parts = [torch.split(x, lengths) for x in (q, k, v)]
    for out, *sequence in zip(torch.split(found, lengths), *parts, strict=True):
        alone = [x.transpose(0, 1)[None] for x in sequence]
        expected = scaled_dot_product_attention(*alone, scale=0.5)[0].transpose(0, 1)
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


def test_another_scale_than_the_kernels_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is given queries that its own scale brings to ours."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, _: Tensor, *longest: int) -> Tensor:
        return vision_attention._by_length(
            q, k, v, tuple(ends.tolist()), 1 / math.sqrt(q.shape[-1])
        )

    q, k, v = torch.randn(3, 9, 2, 8)
    expected = packed_attention(q, k, v, ends_of([4, 5]), 5, 0.7)
    monkeypatch.setattr(vision_attention, "has_kernel", lambda device, dtype: True)
    monkeypatch.setattr(vision_attention, "varlen_attn", kernel)
    torch.testing.assert_close(packed_attention(q, k, v, ends_of([4, 5]), 5, 0.7), expected)


# ------------------------------------------------------------------ compiled


@pytest.fixture
def compiled(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[VisionModel, list[int]]:
    """An encoder whose blocks are traced, and the number of operations of each graph made."""
    graphs: list[int] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is put back
    torch._dynamo.reset()
    encoder = load_encoder(tiny.config)
    assert compile_blocks(encoder._model, tmp_path, backend) == len(
        [m for m in encoder._model.modules() if type(m).__name__.endswith(("Block", "Layer"))]
    )
    return encoder, graphs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_compilation_serves_every_batch(
    tiny: TinyModel, compiled: tuple[VisionModel, list[int]]
) -> None:
    encoder, graphs = compiled
    encoder.encode(tiny.items(IMAGES[:1]))
    encoder.encode(tiny.items([picture(9, 56, 56)]))
    before = len(graphs)
    assert before > 0
    for images in (IMAGES[:1], IMAGES[1:3], IMAGES, IMAGES[4:5], [picture(7, 448, 60)] * 3):
        items = tiny.items(images)
        for found, wanted in zip(encoder.encode(items), tiny.encoder.encode(items), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    if tiny.family in PACKED:
        assert len(graphs) == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_first_batch_of_a_start_compiles_for_all(
    tiny: TinyModel, compiled: tuple[VisionModel, list[int]]
) -> None:
    encoder, graphs = compiled
    first, *others = warm_up_batches(encoder, Processor(tiny.config), batch_patches=4096)
    assert len(first) > 1
    encoder.encode(first)
    before = len(graphs)
    assert before > 0
    for batch in (*others, tiny.items(IMAGES[4:5]), tiny.items(IMAGES)):
        encoder.encode(batch)
    if tiny.family in PACKED:
        assert len(graphs) == before
