"""The encoders' part of a request: where its items are encoded, and what is known of them.

Nobody holds room at one encoder and waits for it at another in a circle. A request first asks all
its encoders at once, and none of them to wait. If one has no room, the request gives back all it
was given and asks again, one encoder after the other in the order of their ids: whoever waits
holds room only at encoders before the one it waits for, and nothing at that one.

Items go where they are ready soonest, which may be one encoder for all of them. Where its pool
could not hold them even if it were empty, the request asks once more with its items spread evenly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from triptych import wire
from triptych.config import RouterConfig
from triptych.errors import TriptychError, rebuild
from triptych.router.attempt import Attempt, together
from triptych.router.call import Call, File, counted
from triptych.router.files import Files
from triptych.router.membership import Membership, Worker
from triptych.router.placement import Item
from triptych.router.timelines import Timelines

SMALL_NBYTES = 1 << 16
"""Files up to here are sent with their digests; of larger ones the encoder is asked first."""


class Encoding:
    def __init__(
        self, config: RouterConfig, membership: Membership, files: Files, timelines: Timelines
    ) -> None:
        self._timeouts = config.timeouts
        self._membership = membership
        self._files = files
        self._timelines = timelines

    async def encode(
        self, call: Call, attempt: Attempt, files: Sequence[File]
    ) -> list[wire.PrefillItem]:
        """Metadata and ref of each item, in order. Raises StageFailed, by NoRoom if the request
        should try again with ``call.patient``, and what an item is refused for."""
        if not files:
            return []
        await self._membership.wait_for(lambda: ("encoder",), self._timeouts.worker)
        items = [Item(file.content, file.patches) for file in files]
        attempt.place_items(items, call.avoided, evenly=call.evenly)
        shares: dict[Worker, list[int]] = {}
        for index, worker in enumerate(attempt.encoders):
            shares.setdefault(worker, []).append(index)
        if call.patient:
            # All bytes at once: what is cached now may be evicted by the time there is room.
            await self._files.fetch_again(call, files, range(len(files)))
            found = [
                await self._at(call, attempt, worker, files, shares[worker])
                for worker in sorted(shares, key=lambda worker: worker.worker_id)
            ]
        else:
            found = await together(
                self._at(call, attempt, worker, files, indices)
                for worker, indices in shares.items()
            )
        encoded = {item.index: item for share in found for item in share}
        return [_encoded(encoded.get(index), index) for index in range(len(files))]

    async def _at(
        self,
        call: Call,
        attempt: Attempt,
        worker: Worker,
        files: Sequence[File],
        indices: Sequence[int],
    ) -> list[wire.EncodedItem]:
        """Ask one encoder by content first, then send the bytes of what it does not know.

        Small files go along with the question: their bytes cost less than a second trip.
        """
        start = time.time()
        at_first = math.inf if call.patient else SMALL_NBYTES
        known = await self._ask(call, attempt, worker, files, indices, at_first)
        missed = [item.index for item in known if item.miss]
        if missed:
            await self._files.fetch_again(call, files, missed)
            known = [item for item in known if not item.miss]
            known += await self._ask(call, attempt, worker, files, missed, math.inf)
        attempt.found_cached(item.index for item in known if item.cached)
        n_known = sum(item.cached for item in known)
        note = f"{worker.worker_id}: {counted([files[i] for i in indices])}, {n_known} known"
        sizes = {i: len(files[i].data or b"") for i in indices}
        nbytes = sum(n for i, n in sizes.items() if i in missed or n <= at_first)
        self._timelines.own(call.request_id, "encode_call", start, nbytes=nbytes, note=note)
        return known

    async def _ask(
        self,
        call: Call,
        attempt: Attempt,
        worker: Worker,
        files: Sequence[File],
        indices: Sequence[int],
        up_to: float,
    ) -> list[wire.EncodedItem]:
        """``up_to``: bytes of the largest file that is sent."""
        known = ((i, files[i].data) for i in indices)
        sent = {i: data for i, data in known if data is not None and len(data) <= up_to}
        message = wire.EncodeRequest(
            request_id=attempt.wire_id,
            items=tuple(
                wire.EncodeItem(
                    i, files[i].digest, sent.get(i), files[i].kind, detail=files[i].detail
                )
                for i in indices
            ),
            images_in_request=call.count("image"),
            wait=call.patient,
        )
        wait_s = self._timeouts.pool if call.patient else 0.0
        reply = await attempt.post(worker, "/encode", message, wire.EncodeResponse, wait_s=wait_s)
        return list(reply.items)


def _encoded(item: wire.EncodedItem | None, index: int) -> wire.PrefillItem:
    """What /encode says of one item, as prefill takes it. Raises what the item is refused for."""
    if item is not None and item.error:
        raise rebuild(item.error, item.reason, item=index)
    if item is None or item.meta is None or item.ref is None:
        raise TriptychError("the encoder said nothing about it", item=index)
    return wire.PrefillItem(meta=item.meta, ref=item.ref)
