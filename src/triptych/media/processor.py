"""A checkpoint's processor: what an image will become, and its pixels as model inputs.

The layout of an image (its text in the prompt, its rows, its patches) follows from its size alone,
so it is known from the header before a pixel is decoded. Transformers' processor class says what
the text is; this module only tells it the sizes.

Without torchvision Transformers cannot build the processors of models that also know video; they
are built here without their video half, on the PIL image processor. Videos: ``clips.py``.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from transformers.image_processing_utils import BaseImageProcessor, select_best_resolution
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import BaseVideoProcessor

from triptych.config import MediaLimits, ModelConfig
from triptych.errors import BadMedia, BadRequest, UnsupportedModel
from triptych.media.clips import VideoPlan, VideoProcessor
from triptych.media.image import ImageHeader
from triptych.media.placeholder import placeholder
from triptych.media.video import Frame, VideoHeader
from triptych.models.refusals import video_token_id
from triptych.models.stream import Stream

Layout = tuple[dict[str, Any], tuple[int, int, int] | None, int]
"""What the processor class needs to know of an image, its grid, its patches."""


@dataclass(frozen=True)
class Plan:
    """What an image becomes, known from its header."""

    text: str
    """What replaces the image's marker in the prompt."""
    rows: int
    """Image tokens in ``text``, which is also the number of embedding rows."""
    grid: tuple[int, int, int] | None
    """(t, h, w) in patches for models with M-RoPE, else None."""
    patches: int
    """Vision patches of the forward: what its cost is measured in."""
    second_per_grid: None = None
    """As a video's plan has it."""


class Processor:
    """Planning and preprocessing of single items. Safe to use from several threads."""

    def __init__(self, config: ModelConfig) -> None:
        """Raises UnsupportedModel: not a family that can be planned, or files that disagree."""
        source = {"pretrained_model_name_or_path": config.model, "revision": config.revision}
        self._config = AutoConfig.from_pretrained(**source)
        self._family: str = self._config.model_type
        if is_torchvision_available():
            self.hf = AutoProcessor.from_pretrained(**source)
        else:
            self.hf = _without_video(self._family, source)
        self._images = self.hf.image_processor
        self.backend: str = self._images.backend
        """"pil", "torchvision", or "torchvision on cuda": their pixels differ by rounding."""
        self._device = torch.device("cpu")
        if self.backend == "torchvision" and torch.device(config.device).type == "cuda":
            self._device = torch.device(config.device)
            self.backend = "torchvision on cuda"
        self._stream = Stream(self._device)
        """Of its own: neither the forwards wait for it nor it for them."""
        self.placeholder = placeholder(self._family, self.hf.tokenizer)
        """The marker that the chat template puts where an image goes."""
        self._check_marker()
        self._videos = self._video_processor(source)
        self._options: dict[str, Any] = {"crop_to_patches": True} if self._tiles_always else {}
        self.fingerprint = _hash(
            {
                "processor": type(self._images).__name__,
                "settings": json.loads(self._images.to_json_string()),
                "options": self._options,
                "transformers": transformers.__version__,
            }
        )
        """Hash of everything that decides which pixels of an image the model sees."""
        self.video_fingerprint = ""
        """The same for videos."""
        if isinstance(self._videos, VideoProcessor):
            self.video_fingerprint = _hash(
                {"processor": self._videos.name, "settings": self._videos.settings}
            )

    @property
    def on_gpu(self) -> bool:
        """Are images preprocessed on a GPU?"""
        return self._device.type == "cuda"

    @property
    def _tiles_always(self) -> bool:
        # The processor class of InternVL asks its image processor for tiles, whatever the
        # image processor's own settings say.
        return self._family == "internvl"

    def context(self, images_in_request: int) -> str:
        """What in the request, besides the image, decides its rows: part of its content key."""
        if self._family != "llava_onevision":
            return ""
        return "alone" if images_in_request == 1 else "among others"

    def plan(self, header: ImageHeader, images_in_request: int) -> Plan:
        """Text, rows, grid and patches of an image, from its header.

        Raises BadMedia: a shape that the model's processor refuses.
        """
        try:
            facts, grid, patches = self._layout(header, images_in_request)
        except ValueError as exc:
            raise BadMedia(f"the model cannot take the image: {exc}") from exc
        text = str(self.hf.replace_image_token(facts, 0))
        return Plan(text, text.count(self.placeholder), grid, patches)

    def preprocess(self, image: Image.Image, images_in_request: int) -> dict[str, Tensor]:
        """The model's vision inputs of one RGB image: ``pixel_values`` float32 and its sizes.

        Where the backend says so they are made, and stay, on the GPU; they are complete when this
        returns. Raises BadMedia: a shape that the model's processor refuses.
        """
        images = [image]
        if self.context(images_in_request) == "among others":
            # The processor looks at how many images it is given; a second one makes it several.
            images = [image, Image.new("RGB", (1, 1))]
        options = dict(self._options)
        if self.on_gpu:
            options["device"] = self._device
        try:
            with self._stream.entered():
                inputs = dict(self._images([images], return_tensors="pt", **options))
                complete = self._stream.mark()
        except ValueError as exc:
            raise BadMedia(f"the model cannot take the image: {exc}") from exc
        complete()
        return self._model_inputs(inputs, images_in_request)

    # ------------------------------------------------------------------ videos

    def plan_video(self, header: VideoHeader, limits: MediaLimits) -> VideoPlan:
        """As ``plan``. Raises BadRequest where the model takes no videos, and BadVideo."""
        return self._for_videos().plan(header, limits)

    def preprocess_video(self, frames: Iterable[Frame], plan: VideoPlan) -> dict[str, Tensor]:
        """The model's vision inputs of the planned frames, in order. Raises as ``frames`` does."""
        return self._for_videos().preprocess(frames, plan)

    @property
    def takes_videos(self) -> bool:
        return isinstance(self._videos, VideoProcessor)

    def refuse_videos(self, reason: UnsupportedModel) -> None:
        """From now on. Called before the first request."""
        self._videos = reason

    def _for_videos(self) -> VideoProcessor:
        if isinstance(self._videos, UnsupportedModel):
            raise BadRequest(f"{self._family} takes no videos here: {self._videos.message}")
        return self._videos

    def _video_processor(self, source: dict[str, Any]) -> VideoProcessor | UnsupportedModel:
        """Or why there is none."""
        try:
            settings, _ = BaseVideoProcessor.get_video_processor_dict(**source)
        except OSError:
            return UnsupportedModel(f"{self._config.model_type} has no video processor")
        # Where the model has no token of its own for a video's rows, the frames are images.
        token_id = video_token_id(self._config)
        row = self.placeholder if token_id is None else self.hf.video_token
        patch = self._config.vision_config.patch_size
        side = patch if isinstance(patch, int) else patch[0]
        try:
            videos = VideoProcessor(self._family, self.hf, settings, row, side)
        except UnsupportedModel as reason:
            return reason
        if self.hf.video_processor is None:  # which the text is made with
            self.hf.video_processor = SimpleNamespace(**videos.settings)
        return videos

    # ------------------------------------------------------------------ images

    def _model_inputs(self, inputs: dict[str, Tensor], images_in_request: int) -> dict[str, Tensor]:
        inputs.pop("num_patches", None)  # InternVL: for the text only
        # Grids and sizes are read on the host.
        inputs = {k: v if v.is_floating_point() else v.cpu() for k, v in inputs.items()}
        if self._family == "llava_onevision":
            inputs = {name: value[:1] for name, value in inputs.items()}
            inputs["batch_num_images"] = inputs["batch_num_images"].new_tensor([images_in_request])
        return inputs

    # ------------------------------------------------------------------ the families

    def _layout(self, header: ImageHeader, images_in_request: int) -> Layout:
        match self._family:
            case "qwen2_5_vl" | "qwen3_vl":
                return self._qwen(header)
            case "llava_onevision":
                return self._llava_onevision(header, images_in_request)
            case _:
                return self._internvl(header)

    def _qwen(self, header: ImageHeader) -> Layout:
        images = self._images
        resize = inspect.getmodule(type(images)).smart_resize  # type: ignore[union-attr]
        height, width = resize(
            header.height,
            header.width,
            factor=images.patch_size * images.merge_size,
            min_pixels=images.size["shortest_edge"],
            max_pixels=images.size["longest_edge"],
        )
        grid = (1, height // images.patch_size, width // images.patch_size)
        return {"image_grid_thw": np.array([grid])}, grid, math.prod(grid)

    def _llava_onevision(self, header: ImageHeader, images_in_request: int) -> Layout:
        tile = self._images.size["height"]
        tiles = 1
        if images_in_request == 1:
            best = select_best_resolution(
                (header.height, header.width), self._images.image_grid_pinpoints
            )
            tiles += math.prod(math.ceil(side / tile) for side in best)
        facts = {
            "batch_num_images": [images_in_request],
            "image_sizes": [[header.height, header.width]],
            # Only the shape of a tile is looked at: a broadcast zero has it and no memory.
            "pixel_values": np.broadcast_to(np.float32(0), (1, tiles, 3, tile, tile)),
        }
        return facts, None, tiles * self.hf.num_image_tokens

    def _internvl(self, header: ImageHeader) -> Layout:
        tiles = self._images.get_number_of_image_patches(
            header.height, header.width, dict(self._options)
        )
        vision = self._config.vision_config
        patches = math.prod(
            side // patch for side, patch in zip(vision.image_size, vision.patch_size, strict=True)
        )
        return {"num_patches": [tiles]}, None, tiles * patches

    def _check_marker(self) -> None:
        """The files of a checkpoint must agree on which token stands for an image row."""
        if self.hf.image_token != self.placeholder:
            raise UnsupportedModel(
                f"the processor marks images by {self.hf.image_token!r}, "
                f"the tokenizer by {self.placeholder!r}"
            )
        ids = self.hf.tokenizer(self.placeholder, add_special_tokens=False)["input_ids"]
        expected = getattr(self._config, "image_token_id", None)
        if ids != [expected]:
            raise UnsupportedModel(
                f"the tokenizer reads {self.placeholder!r} as {ids}, "
                f"the model's image token is {expected}"
            )


def _without_video(family: str, source: dict[str, Any]) -> Any:
    """The family's processor class, with no video processor in it."""
    tokenizer = AutoTokenizer.from_pretrained(**source)
    placeholder(family, tokenizer)  # refuses unknown families by name
    image_processor = _pil_image_processor(source)
    base = getattr(transformers, PROCESSOR_MAPPING_NAMES[family])

    def check(self: Any, name: str, argument: object) -> Any:
        if name == "video_processor" and argument is None:
            return None
        return base.check_argument_for_proper_class(self, name, argument)

    cls = type(base.__name__, (base,), {"check_argument_for_proper_class": check})
    settings, _ = base.get_processor_dict(**source)
    parts = {"image_processor": image_processor, "tokenizer": tokenizer}
    accepted = inspect.signature(base.__init__).parameters
    settings = {
        name: value
        for name, value in settings.items()
        if name in accepted and name not in ("video_processor", *parts)
    }
    settings.setdefault("chat_template", tokenizer.chat_template)
    return cls(**parts, video_processor=None, **settings)


def _pil_image_processor(source: dict[str, Any]) -> Any:
    # AutoImageProcessor would do, but in Transformers 5.17 it insists on torchvision.
    settings, _ = BaseImageProcessor.get_image_processor_dict(**source)
    named = str(settings.get("image_processor_type"))
    cls = getattr(transformers, named.removesuffix("Pil").removesuffix("Fast") + "Pil", None)
    if cls is None:
        raise UnsupportedModel(f"image processor {named} needs torchvision, which is not installed")
    return cls.from_pretrained(**source)


def _hash(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
