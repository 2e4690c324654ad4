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
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, get_args

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import BaseVideoProcessor

from triptych.config import MediaLimits, ModelConfig
from triptych.errors import BadMedia, BadRequest, UnsupportedModel
from triptych.media.clips import VideoPlan, VideoProcessor
from triptych.media.image import ImageHeader
from triptych.media.layouts import Parts, layout, options
from triptych.media.pixels import normalized, pixels
from triptych.media.pixtral import PixtralText
from triptych.media.placeholder import NEVER_SMALLER, VIDEO_MARKERS, family, placeholder
from triptych.media.video import Frame, VideoHeader
from triptych.models.refusals import image_token_id, video_token_id
from triptych.models.stream import Stream
from triptych.request import Detail


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
        self._family = family(self._config)
        try:
            if is_torchvision_available():
                self.hf = AutoProcessor.from_pretrained(**source)
            else:
                self.hf = _without_video(self._family, source)
        except ImportError as exc:
            reason = str(exc).strip().partition("\n")[0]
            raise UnsupportedModel(f"the processor of {self._family}: {reason}") from exc
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
        self.row_token = self._checked_row_token()
        """What stands for an embedding row in a text."""
        self._videos = self._video_processor(source)
        self._parts = {
            detail: Parts(
                self.hf, self._config.vision_config, options(self._family, self.hf, detail)
            )
            for detail in get_args(Detail)
        }
        self.fingerprint = _hash(
            {
                "processor": type(self._images).__name__,
                "settings": json.loads(self._images.to_json_string()),
                "options": self._parts["high"].options,
                "transformers": transformers.__version__,
            }
        )
        """Hash of everything that decides which pixels of an image the model sees, but for the
        request's ``context``."""
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

    def context(self, images_in_request: int, detail: Detail) -> str:
        """What in the request, besides the image, decides its rows: part of its content key.

        Raises BadRequest: the family has no such detail.
        """
        if detail == "low" and self._family in NEVER_SMALLER:
            raise BadRequest(f"{self._family} has no low detail")
        if self._family == "llava_onevision":
            return "alone" if self._together(images_in_request, detail) == 1 else "among others"
        high, asked = self._parts["high"].options, self._parts[detail].options
        return "" if asked == high else json.dumps(asked, sort_keys=True)

    def _together(self, images_in_request: int, detail: Detail) -> int:
        """How many images the family's processor is to believe in. A small one of LLaVA-OneVision
        is one tile, as are those of a request of several."""
        small = detail == "low" and self._family == "llava_onevision"
        return max(images_in_request, 2) if small else images_in_request

    def plan(self, header: ImageHeader, images_in_request: int, detail: Detail = "high") -> Plan:
        """Text, rows, grid and patches of an image, from its header.

        Raises BadMedia: a shape that the model's processor refuses.
        """
        together = self._together(images_in_request, detail)
        try:
            found = layout(self._family, self._parts[detail], header, together)
        except ValueError as exc:
            raise BadMedia(f"the model cannot take the image: {exc}") from exc
        text = str(self.hf.replace_image_token(found.facts, 0))
        return Plan(text, text.count(self.row_token), found.grid, found.patches)

    def preprocess(
        self, image: Image.Image, images_in_request: int, detail: Detail = "high"
    ) -> dict[str, Tensor]:
        """The model's vision inputs of one RGB image: ``pixel_values`` float32 and its sizes.

        Where the backend says so they are made, and stay, on the GPU; they are complete when this
        returns. Raises BadMedia: a shape that the model's processor refuses.
        """
        images = [image]
        together = self._together(images_in_request, detail)
        if self._family == "llava_onevision" and together > 1:
            # The processor looks at how many images it is given; a second one makes it several.
            images = [image, Image.new("RGB", (1, 1))]
        options = dict(self._parts[detail].options)
        if self.on_gpu:
            options |= {"device": self._device, "input_data_format": "channels_first"}
        try:
            with self._stream.entered():
                given = [self._placed(one) for one in images] if self.on_gpu else images
                inputs = dict(self._images([given], return_tensors="pt", **options))
                complete = self._stream.mark()
        except ValueError as exc:
            raise BadMedia(f"the model cannot take the image: {exc}") from exc
        complete()
        return self._model_inputs(inputs, together)

    def _placed(self, image: Image.Image) -> Tensor:
        """(3, height, width) uint8 on the GPU. Left to Transformers, the pixels would be packed and
        copied three times on the way, under Python's lock and from memory that a GPU reads slowly.
        """
        lent = pixels(image)
        staged = torch.empty(lent.shape, dtype=lent.dtype, pin_memory=True).copy_(lent)
        placed = staged.to(self._device, non_blocking=True)
        return placed[..., :3].permute(2, 0, 1).contiguous()

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
        if self._family not in VIDEO_MARKERS:
            return UnsupportedModel("only its images are supported")
        # Where the model has no token of its own for a video's rows, they stand at an image's.
        token_id = video_token_id(self._config)
        row = self.row_token if token_id is None else self.hf.video_token
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
        for name in ("num_patches", "num_crops"):  # for the text only
            inputs.pop(name, None)
        # Grids and sizes are read on the host.
        inputs = {k: v if v.is_floating_point() else v.cpu() for k, v in inputs.items()}
        if self._family == "llava_onevision":
            inputs = {name: value[:1] for name, value in inputs.items()}
            inputs["batch_num_images"] = inputs["batch_num_images"].new_tensor([images_in_request])
        if self._family in ("idefics3", "smolvlm"):
            # One request of several tiles becomes several of one: tiles of any images are a batch.
            inputs = {name: value.transpose(0, 1) for name, value in inputs.items()}
        return inputs

    # ------------------------------------------------------------------ the files

    def _checked_row_token(self) -> str:
        """The files of a checkpoint must agree on which token stands for an image row."""
        if self.hf.image_token != self.placeholder:
            raise UnsupportedModel(
                f"the processor marks images by {self.hf.image_token!r}, "
                f"the tokenizer by {self.placeholder!r}"
            )
        # What marks an image stands for its rows as well, but for Gemma 3.
        row = str(self.hf.tokenizer.image_token) if self._family == "gemma3" else self.placeholder
        ids = self.hf.tokenizer(row, add_special_tokens=False)["input_ids"]
        expected = image_token_id(self._config)
        if ids != [expected]:
            raise UnsupportedModel(
                f"the tokenizer reads {row!r} as {ids}, the model's image token is {expected}"
            )
        return row


def _without_video(family: str, source: dict[str, Any]) -> Any:
    """The family's processor class, with no video processor in it."""
    tokenizer = AutoTokenizer.from_pretrained(**source)
    placeholder(family, tokenizer)  # refuses unknown families by name
    image_processor = _pil_image_processor(source)
    if family in ("mistral3", "pixtral"):
        return PixtralText.load(image_processor, tokenizer, source)
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
    if "video_processor" in accepted:
        settings["video_processor"] = None
    return cls(**parts, **settings)


def _pil_image_processor(source: dict[str, Any]) -> Any:
    # AutoImageProcessor would do, but in Transformers 5.17 it insists on torchvision.
    settings, _ = BaseImageProcessor.get_image_processor_dict(**source)
    named = str(settings.get("image_processor_type"))
    cls = getattr(transformers, named.removesuffix("Pil").removesuffix("Fast") + "Pil", None)
    if cls is None:
        raise UnsupportedModel(f"image processor {named} needs torchvision, which is not installed")

    def normalize(self: Any, image: Any, mean: Any, std: Any, **_: Any) -> Any:
        return normalized(image, mean, std)

    ours = {"normalize": normalize, "__module__": cls.__module__}  # it is asked for by that name
    subclass: Any = type(cls.__name__, (cls,), ours)
    return subclass.from_pretrained(**source)


def _hash(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
