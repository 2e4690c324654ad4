"""The bytes of a request's images and videos: fetched, hashed, forgotten, fetched again."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence

from triptych.config import RouterConfig
from triptych.errors import BadMedia, BadRequest, ClientError
from triptych.media.fetch import check_size, fetch
from triptych.media.size import image_size
from triptych.request import KINDS
from triptych.router.attempt import together
from triptych.router.call import Call, File
from triptych.router.offload import INLINE_NBYTES, offload
from triptych.router.openai import ItemInput
from triptych.router.placement import estimated_patches
from triptych.router.timelines import Timelines

FETCHES = 8
"""Files of one request that are fetched at the same time."""


class Files:
    def __init__(self, config: RouterConfig, timelines: Timelines) -> None:
        self._config = config
        self._timelines = timelines

    async def fetch(self, call: Call) -> list[File]:
        """In the order of the request's items. Raises BadRequest (too many), BadMedia and
        Overloaded (the router holds too many bytes). They count as held until the request ends."""
        limits = self._config.limits
        for kind, most in zip(KINDS, (limits.max_images, limits.max_videos), strict=True):
            if call.count(kind) > most:
                raise BadRequest(
                    f"{call.count(kind)} {kind}s, the limit is {most}", param="messages"
                )
        free = asyncio.Semaphore(FETCHES)

        async def one(index: int) -> File:
            async with free:
                return await self._fetch_one(call, index)

        return await together(one(index) for index in range(len(call.items)))

    async def fetch_again(self, call: Call, files: Sequence[File], indices: Sequence[int]) -> None:
        """Bytes that were forgotten when the first token came, for an encoder that has not their
        embedding. Raises BadMedia if they are not the same any more."""
        for index in indices:
            if files[index].data is None:
                found = await self._fetch_one(call, index)
                if found.digest != files[index].digest:
                    raise BadMedia("it has changed since the request came", item=index)
                files[index].data = found.data

    async def _fetch_one(self, call: Call, index: int) -> File:
        start, limits, item = time.time(), self._config.limits, call.items[index]
        most = limits.max_bytes if item.kind == "image" else limits.max_video_bytes
        inline = call.inline.get(item.url)
        try:
            if inline is not None:
                check_size(inline.nbytes, most)
                file = await offload(inline.nbytes <= INLINE_NBYTES, _file, item, inline.data)
            else:
                data = await fetch(
                    item.url,
                    max_bytes=most,
                    timeout_s=self._config.timeouts.media,
                    allow_private=self._config.allow_private_media,
                    root=self._config.allowed_media_root,
                )
                file = await offload(len(data) <= INLINE_NBYTES, _file, item, lambda: data)
        except ClientError as error:
            error.item = index
            raise
        nbytes = len(file.data or b"")
        if inline is None:
            call.place.hold(nbytes, time.monotonic())  # an inline one's are held as the body's
        self._timelines.own(call.request_id, "fetch", start, item=index, nbytes=nbytes)
        return file


def _file(item: ItemInput, data: Callable[[], bytes]) -> File:
    """Large ones are put together and hashed on a thread, which leaves the interpreter alone."""
    found = data()
    size = image_size(found) if item.kind == "image" else None
    digest = hashlib.sha256(found).hexdigest()
    patches = estimated_patches(len(found), size, item.detail)
    return File(item.kind, found, digest, patches, item.detail)
