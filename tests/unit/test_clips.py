"""Frames, text and pixels of a video are those of Transformers' own processor, to the bit."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.video_utils import VideoMetadata

from tests.families import WITH_VIDEO
from tests.transformers_video import arrays_of_tensors, full_processor
from tests.videos import frame
from triptych.config import MediaLimits, ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.errors import BadRequest, BadVideo, UnsupportedModel
from triptych.media import clip_settings
from triptych.media.clip_settings import BY_FAMILY
from triptych.media.clips import VideoProcessor
from triptych.media.processor import Processor
from triptych.media.video import VideoHeader

LIMITS = MediaLimits()
NUM_FRAMES = {"llava_onevision": 32, "internvl": 8}
ROWS_LIKE_IMAGES = ("InternVLProcessor", "Glm4vProcessor", "SmolVLMProcessor")
SHAPES = [
    (12, (96, 64), 4.0),
    (40, (130, 50), 10.0),
    (2, (64, 64), 4.0),
    (7, (48, 200), 25.0),
    (5, (20, 12), 1.0),
    (61, (320, 240), 29.97),
    (33, (448, 30), 1.5),
]
"""Frames, (width, height), frames per second."""


@dataclass(frozen=True)
class Loaded:
    folder: Path
    ours: Processor
    theirs: Any
    family: str


@pytest.fixture(scope="module", params=WITH_VIDEO)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", request.param)
    ours = Processor(ModelConfig(str(folder)))
    return Loaded(folder, ours, full_processor(folder), request.param)


@cache
def frames(n_frames: int, size: tuple[int, int]) -> Any:
    """(frames, height, width, 3)"""
    return np.stack([frame(i, size) for i in range(n_frames)])


def compare(ours: Processor, theirs: Any, shape: Any, **sampling: Any) -> None:
    n_frames, size, fps = shape
    header = VideoHeader(*size, n_frames, fps)
    plan = ours.plan_video(header, LIMITS)
    pixels = frames(n_frames, size)
    found = ours.preprocess_video((pixels[i] for i in plan.indices), plan)
    with arrays_of_tensors():
        expected = theirs(
            text=[theirs.video_token],
            videos=[[pixels]],
            video_metadata=[{"total_num_frames": n_frames, "fps": fps, "duration": n_frames / fps}],
            do_sample_frames=True,
            return_tensors="pt",
            **sampling,
        )
    assert plan.text == theirs.tokenizer.decode(expected["input_ids"][0])
    if ours.hf.__class__.__name__ == "SmolVLMProcessor":  # theirs: one request of many tiles
        assert torch.all(expected.pop("pixel_attention_mask") == 1)
        expected["pixel_values"] = expected["pixel_values"].transpose(0, 1)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), (name, shape)
        assert value.dtype == expected[name].dtype
    if "second_per_grid_ts" in expected:
        assert plan.second_per_grid == pytest.approx(float(expected["second_per_grid_ts"][0]))
    rows = theirs.tokenizer.convert_tokens_to_ids(
        theirs.image_token if ours.hf.__class__.__name__ in ROWS_LIKE_IMAGES else theirs.video_token
    )
    assert plan.rows == expected["input_ids"][0].tolist().count(rows)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_to_transformers(loaded: Loaded, shape: Any) -> None:
    if loaded.family in NUM_FRAMES:
        # Theirs refuse to take more frames than there are; we take them all.
        sampling = {"num_frames": min(NUM_FRAMES[loaded.family], shape[0])}
    else:
        sampling = {"fps": 2}
    compare(loaded.ours, loaded.theirs, shape, **sampling)


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("qwen2_5_vl", {"size": {"shortest_edge": 28 * 28, "longest_edge": 100 * 100}}),
    ("qwen2_5_vl", {"min_pixels": 4 * 28 * 28, "max_pixels": 16 * 28 * 28}),
    ("qwen2_5_vl", {"cap_pixels_per_frame": True, "max_video_tokens": 60}),
    ("qwen2_5_vl", {"max_frames": 6, "min_frames": 2, "resample": 2}),
    ("qwen3_vl", {"size": {"shortest_edge": 64 * 64, "longest_edge": 300 * 300}}),
    ("qwen3_vl", {"cap_pixels_per_frame": True, "max_video_tokens": 4}),
    ("qwen3_vl", {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.2, 0.1], "max_frames": 5}),
    ("glm4v", {"max_duration": 4}),
    ("glm4v", {"max_duration": 100, "size": {"shortest_edge": 56 * 56, "longest_edge": 200 * 200}}),
    ("smolvlm", {"fps": 0.5, "num_frames": 3}),
    ("smolvlm", {"video_sampling": {"fps": 1, "max_frames": 2, "video_size": {"longest_edge": 9}}}),
    ("smolvlm", {"size": {"longest_edge": 5000}, "max_image_size": {"longest_edge": 70}}),
    ("smolvlm", {"resample": 3, "image_mean": [0.1, 0.2, 0.3], "rescale_factor": 0.01}),
    ("internvl", {"initial_shift": False}),
    ("internvl", {"size": {"height": 56, "width": 84}, "rescale_factor": 0.01}),
]


@pytest.mark.parametrize(("family", "settings"), SETTINGS)
def test_the_checkpoints_settings_count(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_tiny_model(tmp_path / "model", family)
    change(folder, settings)
    ours, theirs = Processor(ModelConfig(str(folder))), full_processor(folder)
    for shape in SHAPES[:4] if family == "internvl" else SHAPES:
        sampling: dict[str, Any] = {"fps": 2}
        if family == "internvl":
            sampling = {"num_frames": min(8, shape[0])}
        elif family == "smolvlm":
            sampling = {}  # its class looks at its settings by itself
        compare(ours, theirs, shape, **sampling)


def test_every_video_is_sampled_as_theirs(tmp_path: Path) -> None:
    """SmolVLM's, up to hours: of long ones the first and the last second are left out."""
    theirs = full_processor(make_tiny_model(tmp_path / "model", "smolvlm"))
    draw = random.Random(0)
    skipped = 0
    for _ in range(300):
        most, fps = draw.choice([1, 2, 7, 64, 500]), draw.choice([0.1, 0.5, 1, 2, 30])
        header = VideoHeader(8, 8, draw.randint(1, 3000), draw.choice([0.2, 1.5, 24, 29.97, 60]))
        settings = {"num_frames": most, "fps": fps}
        ours = VideoProcessor("smolvlm", theirs, settings, theirs.image_token, 14)
        metadata = VideoMetadata(header.frames, fps=header.fps, duration=header.frames / header.fps)
        expected = theirs.video_processor.sample_frames(metadata, **settings)
        assert ours.plan(header, LIMITS).indices == tuple(expected), (header, settings)
        skipped += bool(expected[0])
    assert 20 < skipped < 280


def test_the_first_checkpoints_of_smolvlm(tmp_path: Path) -> None:
    """They have one file for images and videos, and how to sample under a name of its own."""
    folder = make_tiny_model(tmp_path / "model", "smolvlm")
    (folder / "video_preprocessor_config.json").unlink()
    file = folder / "preprocessor_config.json"
    images = json.loads(file.read_text())
    sampling = {"fps": 3, "max_frames": 5, "video_size": {"longest_edge": 90}}
    for size in (images.pop("size"), None):
        sized = {"size": size} if size else {}
        file.write_text(json.dumps({**images, **sized, "video_sampling": sampling}))
        ours, theirs = Processor(ModelConfig(str(folder))), full_processor(folder)
        for shape in SHAPES:
            compare(ours, theirs, shape)
    assert ours.plan_video(VideoHeader(64, 48, 100, 10.0), LIMITS).rows == 5 * 4


def test_a_torch_without_the_filter_resizes_as_its_torchvision(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = BY_FAMILY[loaded.family]
    assert clip_settings.merged(name, {"resample": 1})["resample"] == 1
    monkeypatch.setattr(clip_settings, "is_torch_greater_or_equal", lambda version: False)
    assert clip_settings.merged(name, {"resample": 1})["resample"] == 3
    assert clip_settings.merged(name, {"resample": 2})["resample"] == 2


def change(folder: Path, settings: dict[str, Any]) -> None:
    file = folder / "video_preprocessor_config.json"
    found = json.loads(file.read_text())
    if "min_pixels" in settings:
        del found["size"]
    file.write_text(json.dumps({**found, **settings}))


@pytest.mark.parametrize(
    ("settings", "n_frames"), [({"num_frames": 6}, 6), ({"fps": 4}, 12), ({"num_frames": 200}, 30)]
)
def test_the_checkpoint_says_how_many_frames(
    loaded: Loaded, settings: dict[str, Any], n_frames: int
) -> None:
    if loaded.family in ("glm4v", "smolvlm") and "num_frames" in settings:
        n_frames = 6  # their processors sample by time
    file = json.loads((loaded.folder / "video_preprocessor_config.json").read_text())
    videos = VideoProcessor(loaded.family, loaded.theirs, {**file, **settings}, "x", 14)
    assert len(videos.plan(VideoHeader(64, 64, 30, 10.0), LIMITS).indices) == n_frames


def test_settings_decide_the_fingerprint(loaded: Loaded, tmp_path: Path) -> None:
    assert loaded.ours.video_fingerprint != loaded.ours.fingerprint
    again = Processor(ModelConfig(str(loaded.folder)))
    assert again.video_fingerprint == loaded.ours.video_fingerprint
    folder = make_tiny_model(tmp_path / "model", loaded.family)
    change(folder, {"fps": 1})
    other = Processor(ModelConfig(str(folder)))
    assert other.video_fingerprint != loaded.ours.video_fingerprint
    assert other.fingerprint == loaded.ours.fingerprint


@pytest.mark.parametrize(
    ("header", "limits", "reason"),
    [
        (VideoHeader(64, 64, 1, 4.0), LIMITS, "2 frames or more"),
        (VideoHeader(2000, 5, 10, 4.0), LIMITS, "200 times as long"),
        (VideoHeader(64, 64, 100, 4.0), MediaLimits(max_frames=20), "50 frames.*limit is 20"),
    ],
)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_what_the_processor_refuses(
    family: str, header: VideoHeader, limits: MediaLimits, reason: str, tmp_path: Path
) -> None:
    processor = Processor(ModelConfig(str(make_tiny_model(tmp_path / "model", family))))
    with pytest.raises(BadVideo, match=reason):
        processor.plan_video(header, limits)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"video_processor_type": "OtherVideoProcessor"}, "OtherVideoProcessor is not supported"),
        ({"do_center_crop": True}, "cropping"),
        ({"do_resize": False}, "do_resize"),
        ({"resample": 4}, "filter 4"),
        ({"size": {"shortest_edge": 10}}, "a size without"),
    ],
)
def test_what_is_not_done_here_is_said(
    loaded: Loaded, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        VideoProcessor(
            loaded.family,
            loaded.theirs,
            {"video_processor_type": BY_FAMILY[loaded.family], **settings},
            "x",
            14,
        )


def test_a_family_without_videos_takes_none_whatever_its_files_say(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", "idefics3")
    (folder / "video_preprocessor_config.json").write_text("{}")
    processor = Processor(ModelConfig(str(folder)))
    with pytest.raises(BadRequest, match="idefics3 takes no videos here: only its images"):
        processor.plan_video(VideoHeader(64, 64, 10, 4.0), LIMITS)


def test_a_model_without_a_video_processor_takes_no_videos(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", "internvl")
    change(folder, {"do_rescale": False})
    processor = Processor(ModelConfig(str(folder)))
    assert not processor.takes_videos
    with pytest.raises(BadRequest, match="internvl takes no videos here: .*do_rescale"):
        processor.plan_video(VideoHeader(64, 64, 10, 4.0), LIMITS)
