"""A producer in a process of its own: ``python -m tests.transfer_process TRANSPORT NBYTES``.

Lends one embedding of ``NBYTES`` pseudo-random bytes to request "r1", prints the ref, then makes
it ready when a line comes in. Ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import random
import sys
from typing import cast

import msgspec

from tests.transfer_rig import FAST, SECRET, Worker, hello
from triptych import wire
from triptych.config import TransportName
from triptych.transfer.handshake import dial


def content(nbytes: int) -> bytes:
    return random.Random(nbytes).randbytes(nbytes)


async def main(transport: TransportName, nbytes: int) -> None:
    async with Worker(nbytes, transport).serve() as worker:
        router = await dial(worker.url, hello, SECRET, FAST, None, lambda *_: None, lambda *_: None)
        piece = wire.Piece(worker.region.carve(nbytes), nbytes)
        ref = worker.producer.lend_embedding(
            piece, "key", "uint8", (1, 1, nbytes), holder=router.session, request_id="r1"
        )
        print(msgspec.json.encode(ref).decode(), flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        worker.region.view(piece.offset, nbytes)[:] = content(nbytes)
        worker.producer.ready(ref.slot, [piece], last=True)
        await asyncio.to_thread(sys.stdin.readline)
        print(len(worker.idle), flush=True)
        await router.close()


if __name__ == "__main__":
    asyncio.run(main(cast(TransportName, sys.argv[1]), int(sys.argv[2])))
