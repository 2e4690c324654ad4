"""From the bytes of a file to the model's inputs: decoding and preprocessing, off the event loop.

Each has threads of its own: while one image is resized the next is being decoded, and where a GPU
preprocesses few threads hand it work, however many decode.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from triptych.config import MediaLimits
from triptych.errors import BadMedia, TriptychError
from triptych.media.clips import VideoPlan
from triptych.media.image import ImageHeader, decode
from triptych.media.processor import Processor
from triptych.media.video import VideoHeader
from triptych.media.video import decode as decode_video
from triptych.models.stream import settle, stand_back
from triptych.models.vision import VisionModel
from triptych.request import Detail

logger = logging.getLogger(__name__)

GPU_PREPROCESSORS = 2
"""Threads that preprocess on a GPU: one hands over an image while the other waits for its own."""
MOST_DECODERS = 8
"""Threads that decode unless more are asked for: as many as a large request has images."""


@dataclass(frozen=True)
class RawImage:
    """An image as it came, and what was promised of it."""

    data: bytes
    digest: str
    """SHA-256 that ``data`` should have (hex)."""
    header: ImageHeader
    images_in_request: int
    detail: Detail


@dataclass(frozen=True)
class RawVideo:
    """A video as it came, and what was promised of it."""

    data: bytes
    digest: str
    header: VideoHeader
    plan: VideoPlan


@dataclass(frozen=True)
class Prepared:
    inputs: dict[str, Tensor]
    """The model's vision inputs of this item."""
    began: float
    decoded: float
    preprocessing: float
    preprocessed: float
    """Wall-clock seconds: start and end of each step; a video's frames are preprocessed one by one
    as they are decoded, which counts as decoding."""


LastStep = Callable[[], Prepared]


class Preparer:
    """The executors for decoding and for preprocessing."""

    def __init__(
        self, processor: Processor, limits: MediaLimits, model: VisionModel, threads: int
    ) -> None:
        """``threads``: that decode; as many preprocess, unless a GPU does. 0: as usual."""
        threads = threads or usual_threads()
        self._processor = processor
        self._limits = limits
        self._model = model
        preprocessors = GPU_PREPROCESSORS if processor.on_gpu else threads
        self.at_once = threads + preprocessors
        """Items in preparation that keep every thread busy."""
        own = (_settle_media_thread, (model.device,))
        self._decoding = ThreadPoolExecutor(threads, "encoder-decode", *own)
        self._preprocessing = ThreadPoolExecutor(preprocessors, "encoder-preprocess", *own)

    def submit(self, item: RawImage | RawVideo) -> Future[Prepared]:
        """Has the item, or the error. ``cancel`` keeps steps that have not begun from beginning."""
        future: Future[Prepared] = Future()
        decoding = self._decoding.submit(self._decode, item, future)
        decoding.add_done_callback(partial(self._decoded, future))
        return future

    def close(self) -> None:
        """Ends the threads; items that wait are dropped. Waits for those under way."""
        self._decoding.shutdown(cancel_futures=True)
        self._preprocessing.shutdown(cancel_futures=True)

    # ------------------------------------------------------------------ on the threads

    def _decode(self, item: RawImage | RawVideo, future: Future[Prepared]) -> LastStep:
        _check_wanted(future)
        began = time.time()
        if hashlib.sha256(item.data).hexdigest() != item.digest:
            raise BadMedia("the bytes do not have the hash that they were sent with")
        if isinstance(item, RawVideo):
            # Frame by frame, on one thread: only what the model sees of one stays in memory.
            frames = decode_video(item.data, item.header, item.plan.indices, self._limits)
            inputs = self._processor.preprocess_video(frames, item.plan)
            return partial(self._stage, inputs, began, time.time())
        pixels = decode(item.data, self._limits)
        promised = (item.header.width, item.header.height)
        if pixels.size != promised:
            raise BadMedia(f"the image's header says {promised}, its pixels are {pixels.size}")
        return partial(self._preprocess, pixels, item, began, time.time())

    def _decoded(self, future: Future[Prepared], decoding: Future[LastStep]) -> None:
        if decoding.cancelled() or decoding.exception() is not None:
            _settle(future, decoding)
        else:
            last = self._preprocessing.submit(_run, future, decoding.result())
            last.add_done_callback(partial(_settle, future))

    def _preprocess(
        self, pixels: Image.Image, item: RawImage, began: float, decoded: float
    ) -> Prepared:
        preprocessing = time.time()
        made = self._processor.preprocess(pixels, item.images_in_request, item.detail)
        inputs = self._model.stage(made)
        return Prepared(inputs, began, decoded, preprocessing, time.time())

    def _stage(self, inputs: dict[str, Tensor], began: float, decoded: float) -> Prepared:
        preprocessing = time.time()
        return Prepared(self._model.stage(inputs), began, decoded, preprocessing, time.time())


def usual_threads() -> int:
    """That decode. More than cores to run them wait for each other, some with Python's lock, and
    event loops for them: on two cores two decoding and two preprocessing threads doubled what an
    answer takes, and encoded no more images (docs/benchmarks/encoder.md)."""
    return max(1, min(MOST_DECODERS, (os.cpu_count() or 1) // 2))


def _settle_media_thread(device: torch.device) -> None:
    # Beside a GPU each works on an image of its own: its tensor operations start no threads
    # besides. On a CPU the limit would reach the model's own threads as well.
    settle(device, 0 if device.type == "cpu" else 1)
    stand_back()  # for the engine as well, which hands work to a GPU


def _check_wanted(future: Future[Prepared]) -> None:
    if future.cancelled():
        raise CancelledError


def _run(future: Future[Prepared], step: LastStep) -> Prepared:
    _check_wanted(future)
    return step()


def _settle(future: Future[Prepared], ended: Future[Any]) -> None:
    """What became of the last step that was begun."""
    if ended.cancelled():
        future.cancel()
    if not future.set_running_or_notify_cancel():
        return
    error = ended.exception()
    if error is None:
        future.set_result(ended.result())
    else:
        future.set_exception(error)


def preparation_error(cause: BaseException) -> TriptychError:
    """Why an item's preparation failed, as an error of the tree."""
    if isinstance(cause, TriptychError):
        return cause
    logger.error("preparing an item failed", exc_info=cause)
    return TriptychError(f"it cannot be prepared ({type(cause).__name__})")
