"""The forward: on the one engine thread, which alone touches the model.

Its output is copied once, into the slot that was set aside for it when the request came.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from torch import Tensor

from triptych.config import MediaLimits
from triptych.errors import TriptychError, UnsupportedModel
from triptych.media.image import ImageHeader
from triptych.media.processor import Processor
from triptych.media.video import VideoHeader
from triptych.models.compiled import first_forwards
from triptych.models.stream import Stream, failure, settle_thread
from triptych.models.vision import Item, VisionModel
from triptych.transfer.region import BaseRegion

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One item of a batch and where its embedding goes."""

    slot: int
    inputs: dict[str, Tensor]
    offset: int
    """In the region."""
    shape: tuple[int, int, int]
    """(planes, rows, width)"""


@dataclass(frozen=True)
class BatchResult:
    slots: tuple[int, ...]
    began: float
    encoded: float
    copied: float
    """Wall-clock seconds: start, end of the forward, embeddings in the region."""
    errors: dict[int, TriptychError] = field(default_factory=dict)
    """By slot; every other slot of the batch is full."""


class Runner:
    """The engine thread. ``on_result`` is called on it, once per batch."""

    def __init__(
        self,
        model: VisionModel,
        region: BaseRegion,
        on_result: Callable[[BatchResult], None],
        threads: int = 0,
    ) -> None:
        self._model = model
        self._region = region
        self._on_result = on_result
        self._threads = threads
        self._stream = Stream(model.device)
        self._batches: queue.SimpleQueue[Sequence[Job] | None] = queue.SimpleQueue()
        self._warm_up: Sequence[Sequence[Item]] = ()
        self._warm: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="encoder-engine", daemon=True)

    def start(self, warm_up: Sequence[Sequence[Item]] = ()) -> Future[None]:
        """Encode the batches of ``warm_up``, so that no request pays for what a first forward
        costs (compiling above all), then be ready. The future has the error of one that failed.
        """
        self._warm_up = warm_up
        self._thread.start()
        return self._warm

    def submit(self, batch: Sequence[Job]) -> None:
        self._batches.put(batch)

    def close(self, timeout_s: float) -> None:
        """End after the batches that were submitted; waits at most ``timeout_s``."""
        self._batches.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        settle_thread(self._model.device, self._threads)
        self._first_forwards()
        while (batch := self._batches.get()) is not None:
            self._on_result(self._encode(batch))

    def _first_forwards(self) -> None:
        # Here and not in the main thread: compiled code is valid for the settings of its thread.
        began = time.perf_counter()
        try:
            with first_forwards:
                for items in self._warm_up:
                    with self._stream.entered():
                        self._model.encode(items)
                        self._stream.mark()()
        except Exception as exc:  # engine thread's boundary: whoever starts it is told
            logger.exception("a first forward failed")
            self._warm.set_exception(exc)
            return
        if self._warm_up:
            logger.info("the first forwards took %.1f s", time.perf_counter() - began)
        self._warm.set_result(None)

    def _encode(self, batch: Sequence[Job]) -> BatchResult:
        slots = tuple(job.slot for job in batch)
        began = time.time()
        try:
            with self._stream.entered():
                embeddings = self._model.encode([job.inputs for job in batch])
                encoded = self._stream.mark()
                errors = self._copy(batch, embeddings)
                copied = self._stream.mark()
            # Peers read the slots without asking the device: they hear of them after this.
            return BatchResult(slots, began, encoded(), copied(), errors)
        except Exception as exc:  # engine thread's boundary: a batch fails by name, work goes on
            logger.exception("a forward of %d items failed", len(batch))
            device = self._model.device
            error = failure(device, f"the vision model failed: {type(exc).__name__}: {exc}")
            now = time.time()
            return BatchResult(slots, began, now, now, dict.fromkeys(slots, error))

    def _copy(self, batch: Sequence[Job], embeddings: list[Tensor]) -> dict[int, TriptychError]:
        errors: dict[int, TriptychError] = {}
        for job, embedding in zip(batch, embeddings, strict=True):
            if tuple(embedding.shape) != job.shape or embedding.dtype != self._model.dtype:
                errors[job.slot] = TriptychError(
                    f"the vision model produced {tuple(embedding.shape)} {embedding.dtype} "
                    f"where {job.shape} {self._model.dtype} was planned"
                )
                continue
            self._region.tensor(job.offset, job.shape, embedding.dtype).copy_(embedding)
        return errors


# ------------------------------------------------------------------ at start


def warm_up_batches(
    model: VisionModel, processor: Processor, batch_patches: int
) -> list[list[Item]]:
    """Batches for ``Runner.start``: as much as may come, several sizes, and one small image.

    In this order: compiled kernels serve every size, but are laid out for the first they see. The
    first has two sizes, so that nothing is taken for equal that is not always.
    """

    def item(width: int, height: int, images_in_request: int = 2) -> Item:
        image = Image.new("RGB", (width, height), (127, 64, 32))
        return model.stage(processor.preprocess(image, images_in_request))

    large, small = item(1920, 1080), item(448, 448)
    count = max(1, batch_patches // model.patches(large))
    return [[large] * count + [small], [small, item(320, 224)], [item(96, 64, 1)]]


def self_check(model: VisionModel, processor: Processor) -> None:
    """Encode one small image and compare with what was planned. Raises UnsupportedModel.

    The same with a small video, where videos are taken: a model that gets it wrong takes none.
    """
    image = Image.new("RGB", (96, 64), (127, 64, 32))
    header = ImageHeader(image.width, image.height, "PNG")
    for images_in_request in (1, 2):
        plan = processor.plan(header, images_in_request)
        _compare(model, processor.preprocess(image, images_in_request), plan.rows)
    if not processor.takes_videos:
        return
    frames = np.zeros((4, image.height, image.width, 3), np.uint8)
    video = processor.plan_video(
        VideoHeader(image.width, image.height, len(frames), fps=2.0), MediaLimits()
    )
    try:
        inputs = processor.preprocess_video((frames[i] for i in video.indices), video)
        _compare(model, inputs, video.rows)
    except UnsupportedModel as error:
        logger.warning("no videos: %s", error)
        processor.refuse_videos(error)


def _compare(model: VisionModel, inputs: dict[str, Tensor], rows: int) -> None:
    (embedding,) = model.encode([inputs])
    planned = (model.planes, rows, model.width)
    if tuple(embedding.shape) != planned:
        raise UnsupportedModel(
            f"the vision model makes {tuple(embedding.shape)} where its processor plans {planned}"
        )
