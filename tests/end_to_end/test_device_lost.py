"""A GPU that has failed for a process: the worker ends, so that another can take its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from tests.end_to_end.cluster import Cluster
from tests.end_to_end.encoder_bench import picture, png
from tests.end_to_end.routing import with_images
from triptych.config import Timeouts
from triptych.demo.tiny import make_tiny_model
from triptych.errors import DeviceLost, TriptychError
from triptych.models import stream
from triptych.models.stream import failure, settle

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def broken(*arguments: object) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_work_that_failed_on_a_device_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    for device in (CPU, CUDA):
        assert type(failure(device, "no")) is TriptychError


def test_a_device_that_does_nothing_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    error = failure(CUDA, "no")
    assert isinstance(error, DeviceLost)
    assert error.retryable


def break_language(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.host.engine._runner, "launch", broken)


def break_encoder(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.service._model, "encode", broken)


@pytest.mark.parametrize(
    ("role", "breaks"), [("language", break_language), ("encoder", break_encoder)]
)
def test_the_worker_ends_and_its_request_with_a_named_error(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    role: str,
    breaks: Callable[[Any, pytest.MonkeyPatch], None],
) -> None:
    """Nobody takes its place here: the whole cluster ends with it."""
    cluster = Cluster(folder, "E/PD", timeouts=Timeouts(worker=1.0))
    with cluster:
        worker = next(stage.service for stage in cluster.stages if stage.role == role)
        breaks(worker, monkeypatch)
        monkeypatch.setattr(stream, "drain", lambda device: False)
        client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="-", max_retries=0, timeout=60)
        with client, pytest.raises(openai.APIError):
            client.chat.completions.create(
                model=str(folder), messages=with_images(png(picture(1, 64, 64))), max_tokens=2
            )
        cluster._thread.join(30)
        assert not cluster._thread.is_alive(), "the worker goes on"
    assert isinstance(cluster._error, DeviceLost)
    assert "illegal memory access" in cluster._error.message


def test_a_thread_works_on_its_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams, kernels and captures that name none would be another GPU's."""
    devices: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    before = torch.get_num_threads()
    settle(torch.device("cuda", 1))
    settle(CPU)
    assert devices == [torch.device("cuda", 1)] and torch.get_num_threads() == before
