"""Messages between roles: frozen msgspec structs in msgpack, tagged, versioned, size-limited.

Two kinds of connection carry them.

*Channel* (WebSocket ``/channel``, binary frames): every worker keeps one to its router, and every
consumer one to each of its producers. It starts with a mutual challenge on the shared secret, one
message a frame; from then on a frame is a list of messages, all that were waiting when it was
sent. Whoever loses the channel loses every lease it held.

*HTTP* (``POST``, one message as body and one as answer): the router's requests to a worker. They
carry the channel's session id and a token that only its two ends can compute.

Nothing here is pickled and no field is free-form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import msgspec

from triptych.capabilities import Capacity as Capacity
from triptych.capabilities import ModelIdentity as ModelIdentity
from triptych.capabilities import TransportOffer as TransportOffer
from triptych.capabilities import mismatch as mismatch
from triptych.refs import AnyRef, EmbeddingRef, KVLayout, KVRef
from triptych.request import Detail, ItemMeta, Kind, Sampling, Span, TokenEvent

VERSION = 6
"""Of this file's messages. Peers of another version are refused at hello, both named."""
MAX_FRAME = 16 << 20
"""Bytes of the largest channel frame."""
SESSION_HEADER = "x-triptych-session"
TOKEN_HEADER = "x-triptych-token"
MEDIA_TYPE = "application/x-msgpack"


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of all. The tag is the class name."""


# ------------------------------------------------------------------ handshake


class Challenge(Message, frozen=True, tag="challenge"):
    version: int
    nonce: str


class Hello(Message, frozen=True, tag="hello"):
    """The dialling side introduces and proves itself."""

    version: int
    release: str
    role: str
    """router | encoder | prefill | decode | language"""
    worker_id: str
    url: str
    """Base URL of the dialling worker's own control endpoint."""
    nonce: str
    process: str
    """Nonce of the dialling process; new at each start."""
    identity: ModelIdentity
    capacity: Capacity
    proof: str
    kv: KVLayout | None = None
    """Of the KV that this worker hands over or takes; None when it does neither."""
    transports: tuple[str, ...] = ()
    """Kinds by which it can read and be read, the best first."""


class Welcome(Message, frozen=True, tag="welcome"):
    """The answering side accepts and proves itself."""

    session: str
    role: str
    worker_id: str
    process: str
    proof: str
    offers: tuple[TransportOffer, ...] = ()
    kv: KVLayout | None = None
    """As in ``Hello``."""


class Refused(Message, frozen=True, tag="refused"):
    reason: str


# ------------------------------------------------------------------ on every channel


class Ping(Message, frozen=True, tag="ping"):
    """Heartbeat: renews every lease held through this channel."""


class Pong(Message, frozen=True, tag="pong"):
    pass


# ------------------------------------------------------------------ consumer ⇄ producer


class Claim(Message, frozen=True, tag="claim"):
    """Take over the lease of ``ref``. ``claim`` is the consumer's own number for it."""

    claim: int
    ref: AnyRef
    request_id: str


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """Contiguous bytes of the producer's pool."""

    offset: int
    nbytes: int


class Ready(Message, frozen=True, tag="ready"):
    """Pieces ``first .. first + len(pieces)`` may be read; the host saw them complete."""

    claim: int
    first: int
    pieces: tuple[Piece, ...]
    last: bool
    note: bytes = b""
    """Sent with the last pieces; the KV hand-off puts ``PrefillDone`` here."""


class Denied(Message, frozen=True, tag="denied"):
    """The claim ends: never granted, failed while it was being filled, or expired."""

    claim: int
    error: str
    """Class name in the error tree."""
    reason: str
    item: int = -1


class Validate(Message, frozen=True, tag="validate"):
    """Were pieces ``first .. first + count`` still leased to this claim when they were read?"""

    claim: int
    first: int
    count: int


class Valid(Message, frozen=True, tag="valid"):
    claim: int
    first: int
    count: int


class Expired(Message, frozen=True, tag="expired"):
    """What was read since the last ``Valid`` must not be used."""

    claim: int


class Release(Message, frozen=True, tag="release"):
    claim: int


class PrefillDone(Message, frozen=True, tag="prefill_done"):
    """What decode needs besides the KV bytes."""

    first: TokenEvent
    next_position: int
    """Position id of the first generated token, equal on every M-RoPE axis."""


# ------------------------------------------------------------------ worker → router


class Tokens(Message, frozen=True, tag="tokens"):
    """Every token of one engine step, for all requests together."""

    tokens: tuple[TokenEvent, ...]


class Failed(Message, frozen=True, tag="failed"):
    """A stage ended without its result."""

    request_id: str
    stage: str
    error: str
    """Class name in the error tree."""
    reason: str
    item: int = -1
    retryable: bool = False


class Spans(Message, frozen=True, tag="spans"):
    request_id: str
    spans: tuple[Span, ...]


class Draining(Message, frozen=True, tag="draining"):
    """This worker is to be given nothing new. ``done``: nothing runs here any more."""

    done: bool = False


# ------------------------------------------------------------------ router → worker, channel


class Cancel(Message, frozen=True, tag="cancel"):
    """End everything this worker does for the request. Idempotent."""

    request_id: str


class Drain(Message, frozen=True, tag="drain"):
    """Begin to drain."""


class Unneeded(Message, frozen=True, tag="unneeded"):
    """To a worker that drains: no request of this router is with it any more."""


# ------------------------------------------------------------------ router → worker, HTTP


class EncodeItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    index: int
    digest: str
    """SHA-256 of the raw bytes (hex)."""
    data: bytes | None = None
    """The raw file; None asks whether it is known already."""
    kind: Kind = "image"
    detail: Detail = "high"
    """Of an image."""


class EncodeRequest(Message, frozen=True, tag="encode"):
    """``POST /encode``: first with digests alone, then with the bytes of those missed."""

    request_id: str
    items: tuple[EncodeItem, ...]
    images_in_request: int
    """Some models lay an image out differently when it is not alone."""
    wait: bool = True
    """For room in the pool, if there is none; else the answer is NoRoom."""


class EncodedItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    index: int
    miss: bool = False
    """The bytes are needed."""
    cached: bool = False
    meta: ItemMeta | None = None
    ref: EmbeddingRef | None = None
    error: str = ""
    """Class name in the error tree, when this item alone is at fault."""
    reason: str = ""


class EncodeResponse(Message, frozen=True, tag="encoded"):
    items: tuple[EncodedItem, ...]


class PrefillItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    meta: ItemMeta
    ref: EmbeddingRef


class PrefillRequest(Message, frozen=True, tag="prefill"):
    """``POST /prefill`` (KV stays for decode) and ``POST /generate`` (language worker)."""

    request_id: str
    token_ids: tuple[int, ...]
    """The prompt; each item's rows are the next ``rows`` tokens that stand for rows."""
    items: tuple[PrefillItem, ...]
    sampling: Sampling
    resumed: tuple[int, ...] = ()
    """Tokens of the answer that a lost worker made: computed with the prompt, not made again."""


class PrefillResponse(Message, frozen=True, tag="prefill_accepted"):
    kv: KVRef | None


class ReserveRequest(Message, frozen=True, tag="reserve"):
    """``POST /reserve``: blocks for prompt and answer, before prefill spends work."""

    request_id: str
    n_tokens: int


class ReserveResponse(Message, frozen=True, tag="reserved"):
    n_blocks: int


class DecodeRequest(Message, frozen=True, tag="decode"):
    """``POST /decode``: claim the KV and go on from its first token."""

    request_id: str
    kv: KVRef
    """Of the prompt and of ``resumed``."""
    sampling: Sampling
    resumed: tuple[int, ...] = ()
    """As in ``PrefillRequest``."""


class Accepted(Message, frozen=True, tag="accepted"):
    pass


class Problem(Message, frozen=True, tag="problem"):
    """Body of every answer that is not 2xx between roles."""

    error: str
    reason: str
    item: int = -1
    retry_after_s: float = 0.0


ChannelMessage = (
    Challenge | Hello | Welcome | Refused | Ping | Pong | Claim | Ready | Denied | Validate
    | Valid | Expired | Release | Tokens | Failed | Spans | Draining | Cancel | Drain | Unneeded
)  # fmt: skip

M = TypeVar("M", bound=Message)
T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()
_channel = msgspec.msgpack.Decoder(ChannelMessage)
_frame = msgspec.msgpack.Decoder(list[ChannelMessage])
_decoders: dict[type[Message], msgspec.msgpack.Decoder[Message]] = {}


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def pack(messages: Sequence[bytes]) -> bytes:
    """A frame of encoded messages (fewer than 2**16)."""
    count = len(messages)
    head = bytes((0x90 | count,)) if count < 16 else b"\xdc" + count.to_bytes(2, "big")
    return b"".join((head, *messages))


def unpack(frame: bytes) -> list[ChannelMessage]:
    """Raises msgspec.DecodeError or ValidationError on bytes that are not known messages."""
    if len(frame) > MAX_FRAME:
        raise msgspec.DecodeError(f"frame of {len(frame)} bytes, the limit is {MAX_FRAME}")
    return read(_frame, frame)


def decode_channel(message: bytes) -> ChannelMessage:
    """One message, as in the handshake. Raises as ``unpack``."""
    return read(_channel, message)  # type: ignore[no-any-return]


def decode(body: bytes, kind: type[M]) -> M:
    """Raises msgspec.DecodeError or ValidationError on bytes that are not a ``kind``."""
    decoder = _decoders.get(kind) or _decoders.setdefault(kind, msgspec.msgpack.Decoder(kind))
    return read(decoder, body)  # type: ignore[return-value]


def read(decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T:
    """As ``decoder.decode``, whose other errors become msgspec.DecodeError."""
    try:
        return decoder.decode(data)
    except (UnicodeDecodeError, RecursionError) as exc:
        raise msgspec.DecodeError(str(exc)) from exc
