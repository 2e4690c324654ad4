"""Videos and images on a GPU give the CPU's answer, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.cluster import Cluster
from tests.end_to_end.video_reference import Part, VideoReference, clip, for_openai, skip_rowless
from tests.families import WITH_VIDEO
from tests.gpu.test_topologies import DEVICE, MAX_TOKENS, ask, compare
from triptych.demo.tiny import make_tiny_model
from triptych.media.placeholder import ONE_KIND


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_mixed_with_images(family: str, tmp_path: Path) -> None:
    skip_rowless(family)
    folder = make_tiny_model(tmp_path / "model", family)
    reference = VideoReference(folder, DEVICE)
    parts: list[Part] = [("video", clip(1, fps=7)), ("image", 0), ("video", clip(2)), ("text", "?")]
    if family in ONE_KIND:
        del parts[1]
    with Cluster(folder, transport="http", device=DEVICE, dtype="float32") as cluster:
        compare(ask(cluster.url, for_openai(parts)), reference.answer(parts, MAX_TOKENS))
