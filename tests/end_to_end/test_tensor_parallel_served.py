"""Workers of two ranks as ``triptych serve`` starts them: the single model's own answers, one read
of each image, KV from rank to rank, and the successor of a group that has lost a rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest
import torch

from tests.end_to_end.checks import check, moved_by, tokens
from tests.end_to_end.cluster import timeline
from tests.end_to_end.reference import Reference, question
from tests.end_to_end.served import Served
from triptych.demo.tiny import make_tiny_model

pytestmark = pytest.mark.full
TWO_RANKS = ("--tensor-parallel", "2")
FOLLOWER = "triptych.stage.follower"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Reference]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "qwen3_vl", "qwen3_vl")
    yield folder, Reference(folder)
    torch.set_num_threads(threads)


def followers(served: Served) -> list[psutil.Process]:
    children = psutil.Process(served.process.pid).children(recursive=True)
    return [child for child in children if FOLLOWER in child.cmdline()]


def kv_nbytes(url: str) -> int:
    """That decode has read for a request with one picture."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=question([5]),  # type: ignore[arg-type]
        max_tokens=3,
    )
    spans = timeline(url, answer.id.removeprefix("chatcmpl-"))["spans"]
    reads = [span for span in spans if span["name"] == "read"]
    assert len(reads) == 1, "an image is read once, however many ranks there are"
    (kv,) = (span for span in spans if span["name"] == "kv_read")
    return int(kv["nbytes"])


@pytest.mark.parametrize("transport", ["shm", "http", "mooncake"])
def test_prefill_and_decode(model: tuple[Path, Reference], transport: str) -> None:
    folder, reference = model
    options = (*TWO_RANKS, "--transport", transport, "--chunk-tokens", "40")
    with Served(folder, "E/P/D", options) as served:
        assert len(followers(served)) == 2
        check(served.url, reference)
        assert moved_by(served.url) == {transport}
        expected = [tokens(served.url, [4, 5], seed=7, temperature=0.9) for _ in range(2)]
        assert expected[0] == expected[1]
        both = kv_nbytes(served.url)
    if transport == "shm":
        with Served(folder, "E/P/D", ("--chunk-tokens", "40")) as served:
            assert tokens(served.url, [4, 5], seed=7, temperature=0.9) == expected[0]
            assert kv_nbytes(served.url) == both


def test_language_goes_on_without_the_rank_that_was_killed(
    model: tuple[Path, Reference],
) -> None:
    folder, reference = model
    with Served(folder, "E/PD", TWO_RANKS) as served:
        check(served.url, reference)
        (follower,) = followers(served)
        (leader,) = served.workers("language")
        follower.kill()
        leader.wait(20)
        served.wait()
        check(served.url, reference)
        assert len(followers(served)) == 1


def test_everything_in_one_process_but_the_follower(model: tuple[Path, Reference]) -> None:
    folder, reference = model
    with Served(folder, "EPD", TWO_RANKS) as served:
        assert len(followers(served)) == 1
        check(served.url, reference)
