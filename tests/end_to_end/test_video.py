"""Videos, alone and among images: tokens and logits are Transformers' own, in float32."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import openai
import pytest

from tests.end_to_end.checks import check_answer
from tests.end_to_end.cluster import Cluster
from tests.end_to_end.served import Served
from tests.end_to_end.video_reference import Part, VideoReference, clip, for_openai, skip_rowless
from tests.families import WITH_VIDEO
from triptych.demo.tiny import make_tiny_model
from triptych.media.placeholder import ONE_KIND

MAX_TOKENS = 10
CONVERSATIONS: dict[str, list[Part]] = {
    "a video": [("video", clip(0)), ("text", "What happens?")],
    "mixed": [
        ("text", "Here: "),
        ("image", 0),
        ("video", clip(1, fps=7)),  # a step of its grid is not a whole second
        ("text", " and "),
        ("video", clip(2)),
        ("image", 1),
        ("text", "Compare."),
    ],
}

VIDEOS_ALONE: dict[str, list[Part]] = {
    "a video": CONVERSATIONS["a video"],
    "two": [part for part in CONVERSATIONS["mixed"] if part[0] != "image"],
}
"""For models that take images or videos."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    root = tmp_path_factory.mktemp("models")

    @cache
    def model(family: str) -> tuple[Path, VideoReference]:
        folder = make_tiny_model(root / family, family)
        return folder, VideoReference(folder)

    yield model


@pytest.mark.parametrize("family", WITH_VIDEO)
@pytest.mark.parametrize("topology", ["E/P/D", "E/PD"])
def test_answers_equal_transformers(models, family: str, topology: str) -> None:  # type: ignore[no-untyped-def]
    skip_rowless(family)
    folder, reference = models(family)
    with Cluster(folder, topology, chunk_tokens=40) as cluster:
        client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
        conversations = VIDEOS_ALONE if family in ONE_KIND else CONVERSATIONS
        for parts in conversations.values():
            expected = reference.answer(parts, MAX_TOKENS)
            check_answer(client, for_openai(parts), expected, MAX_TOKENS)


def test_all_in_one_process(models) -> None:  # type: ignore[no-untyped-def]
    folder, reference = models("qwen2_5_vl")
    with Served(folder, "EPD") as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        parts = CONVERSATIONS["mixed"]
        check_answer(client, for_openai(parts), reference.answer(parts, MAX_TOKENS), MAX_TOKENS)


def test_fetched_by_url_and_streamed(models) -> None:  # type: ignore[no-untyped-def]
    """As a client of OpenAI's would: ``video_url`` is a part like any other."""
    folder, reference = models("qwen3_vl")
    film = clip(2, 30, fps=10, container="webm", codec="libvpx-vp9")
    expected = reference.answer([("video", film), ("text", "And?")], MAX_TOKENS)
    with Cluster(folder, "E/P/D", encoders=2) as cluster, served_file(film) as url:
        client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "video_url", "video_url": {"url": url}},  # type: ignore[list-item]
                        {"type": "text", "text": "And?"},
                    ],
                }
            ],
            max_tokens=MAX_TOKENS,
            temperature=0,
            stream=True,
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == expected.text


@contextmanager
def served_file(data: bytes) -> Iterator[str]:
    """``data`` behind a URL of this host."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/film.webm"
        server.shutdown()
        thread.join()
