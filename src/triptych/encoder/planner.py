"""What an item will be once it is encoded: its key, its text, its rows, what it costs.

Known before anything is decoded; a video costs more to look at than an image, and is looked at on
a thread.
"""

from __future__ import annotations

import asyncio
import hashlib

from triptych import wire
from triptych.config import MediaLimits
from triptych.encoder import counts
from triptych.encoder.cache import EmbeddingCache
from triptych.encoder.embedding import Draft
from triptych.encoder.preparation import RawImage, RawVideo
from triptych.errors import ClientError, PromptTooLong
from triptych.media import image, video
from triptych.media.clips import VideoPlan
from triptych.media.processor import Plan, Processor
from triptych.media.video import VideoHeader
from triptych.models.vision import VisionModel
from triptych.request import ItemMeta

Header = VideoHeader | ClientError
"""Of a video, or what is wrong with it."""


class Planner:
    def __init__(
        self,
        identity: wire.ModelIdentity,
        processor: Processor,
        model: VisionModel,
        limits: MediaLimits,
        pool_nbytes: int,
    ) -> None:
        self._identity = identity
        self._processor = processor
        self._model = model
        self._limits = limits
        self._pool_nbytes = pool_nbytes

    def key(self, item: wire.EncodeItem, images_in_request: int) -> str:
        """Everything that decides the bytes of an embedding, and nothing else."""
        processor = self._processor
        processed = [processor.fingerprint, processor.context(images_in_request, item.detail)]
        if item.kind == "video":
            processed = [processor.video_fingerprint]
        facts = (
            item.kind,
            item.digest,
            self._identity.fingerprint,
            self._identity.dtype,
            processor.backend,
            *processed,
        )
        return hashlib.sha256("\0".join(facts).encode()).hexdigest()

    async def video_headers(self, message: wire.EncodeRequest) -> dict[str, Header]:
        """By digest: the header of each video that came, or what is wrong with it.

        Counting a video's frames takes too long for the event loop.
        """
        videos = {
            item.digest: item.data
            for item in message.items
            if item.kind == "video" and item.data is not None
        }

        def read(data: bytes) -> Header:
            try:
                return video.read_header(data, self._limits)
            except ClientError as error:
                return error

        found = await asyncio.gather(*(asyncio.to_thread(read, data) for data in videos.values()))
        return dict(zip(videos, found, strict=True))

    def draft(
        self,
        key: str,
        item: wire.EncodeItem,
        message: wire.EncodeRequest,
        headers: dict[str, Header],
    ) -> Draft:
        """Raises BadMedia."""
        assert item.data is not None
        plan: Plan | VideoPlan
        raw: RawImage | RawVideo
        if item.kind == "video":
            found = headers[item.digest]
            if isinstance(found, ClientError):
                raise found
            plan = self._processor.plan_video(found, self._limits)
            raw = RawVideo(item.data, item.digest, found, plan)
        else:
            header = image.read_header(item.data, self._limits)
            context = message.images_in_request, item.detail
            plan = self._processor.plan(header, *context)
            raw = RawImage(item.data, item.digest, header, *context)
        meta = ItemMeta(
            key=key,
            text=plan.text,
            rows=plan.rows,
            grid=plan.grid,
            planes=self._model.planes,
            width=self._model.width,
            dtype=self._identity.dtype,
            kind=item.kind,
            second_per_grid=plan.second_per_grid,
        )
        if meta.nbytes > self._pool_nbytes:
            raise PromptTooLong(
                f"the {item.kind}'s embedding has {meta.nbytes} bytes, the pool {self._pool_nbytes}"
            )
        return Draft(meta, plan.patches, raw)


class Asked:
    """What one ``EncodeRequest`` asks for: drafts are made when they are first missing."""

    def __init__(
        self, message: wire.EncodeRequest, planner: Planner, headers: dict[str, Header]
    ) -> None:
        self.message = message
        self.keys = {
            item.index: planner.key(item, message.images_in_request) for item in message.items
        }
        """By index of the item."""
        self.drafts: dict[str, Draft] = {}
        self._planner = planner
        self._headers = headers
        self._faults: dict[str, ClientError] = {}

    def missing(self, cache: EmbeddingCache) -> dict[str, Draft]:
        """By key: what came with its bytes, is in order, and is not in the cache now. What is
        there counts as used, so that it is not evicted first to make room for the rest."""
        found: dict[str, Draft] = {}
        for item in self.message.items:
            key = self.keys[item.index]
            if cache.find(key) is not None or item.data is None:
                continue
            if key in self._faults or key in found:
                continue
            try:
                if key not in self.drafts:
                    self.drafts[key] = self._planner.draft(key, item, self.message, self._headers)
                found[key] = self.drafts[key]
            except ClientError as error:
                counts.refused(error)
                self._faults[key] = error
        return found

    def without_slot(self, index: int) -> wire.EncodedItem:
        """The answer for an item that is at fault, or whose bytes are wanted."""
        fault = self._faults.get(self.keys[index])
        if fault is None:
            return wire.EncodedItem(index, miss=True)
        return wire.EncodedItem(index, error=type(fault).__name__, reason=fault.message)
