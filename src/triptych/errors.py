"""Every error that Triptych raises on purpose, as one tree.

::

    TriptychError
    ├── ClientError            the request is at fault; sending it again will not help        4xx
    │   ├── BadRequest         a field is missing, unknown, of the wrong type or out of range 400
    │   ├── BadMedia           an image cannot be fetched, read or accepted                   400
    │   │   └── BadVideo       or a video                                                     400
    │   ├── PromptTooLong      prompt and answer do not fit the model or the pools            400
    │   ├── Unauthorized       the API key is missing or wrong                                401
    │   ├── UnknownModel       the model asked for is not the one served                      404
    │   └── UnknownWorker      no worker has that name                                        404
    ├── Overloaded             nobody is at fault; try again later                            429
    │   └── NoRoom             a pool is full, and the request was not to wait for it         429
    ├── Cancelled              the client went away or asked for an end                       499
    ├── DeadlineExceeded       a named timeout passed                                         504
    ├── WorkerLost             a worker died or cannot be reached; another may do the work    503
    │   └── DeviceLost         its GPU has failed; the worker ends                            503
    ├── TransferFailed         bytes could not be moved; another attempt may succeed          503
    │   └── SlotGone           what a ref names was let go: to be made again                  503
    ├── PeerRefused            the peer speaks another version, serves another model or
    │   │                      lays its KV out otherwise                                  502
    │   └── PeerUnproven       or knows another secret: perhaps somebody else's process
    │                          has taken a dead worker's address                          502
    ├── UnsupportedModel       the model layer gets this model wrong, or cannot load it   start-up
    └── ConfigError            an option is wrong                                         start-up

``retryable`` says whether the same work may succeed on another worker or at another time.
"""

from __future__ import annotations

from typing import ClassVar


class TriptychError(Exception):
    """Base of the tree. ``status`` is the HTTP status, ``code`` the stable name in an answer."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None, item: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        """JSON path of the request field at fault, as in ``messages[0].content[1].image_url``."""
        self.item = item
        """Index of the item (image or video) at fault among the request's, from 0."""


class ClientError(TriptychError):
    status = 400
    code = "invalid_request_error"


class BadRequest(ClientError):
    pass


class BadMedia(ClientError):
    code = "invalid_image"


class BadVideo(BadMedia):
    code = "invalid_video"


class PromptTooLong(ClientError):
    code = "context_length_exceeded"


class Unauthorized(ClientError):
    status = 401
    code = "invalid_api_key"


class UnknownModel(ClientError):
    status = 404
    code = "model_not_found"


class UnknownWorker(ClientError):
    status = 404
    code = "worker_not_found"


class Overloaded(TriptychError):
    status = 429
    code = "overloaded"
    retryable = True

    def __init__(
        self, message: str, *, retry_after_s: float = 1.0, item: int | None = None
    ) -> None:
        super().__init__(message, item=item)
        self.retry_after_s = retry_after_s


class NoRoom(Overloaded):
    pass


class Cancelled(TriptychError):
    status = 499
    code = "cancelled"


class DeadlineExceeded(TriptychError):
    status = 504
    code = "deadline_exceeded"


class WorkerLost(TriptychError):
    status = 503
    code = "worker_lost"
    retryable = True


class DeviceLost(WorkerLost):
    pass


class TransferFailed(TriptychError):
    status = 503
    code = "transfer_failed"
    retryable = True

    def __init__(self, message: str, *, quarantine_s: float = 0.0, item: int | None = None) -> None:
        super().__init__(message, item=item)
        self.quarantine_s = quarantine_s
        """Seconds during which the transport may still write into the destination."""


class SlotGone(TransferFailed):
    code = "slot_gone"


class PeerRefused(TriptychError):
    status = 502
    code = "peer_refused"


class PeerUnproven(PeerRefused):
    code = "peer_unproven"
    retryable = True


class UnsupportedModel(TriptychError):
    code = "unsupported_model"


class ConfigError(TriptychError):
    code = "config_error"


def _leaves(base: type[TriptychError]) -> list[type[TriptychError]]:
    return [base, *(leaf for child in base.__subclasses__() for leaf in _leaves(child))]


BY_NAME: dict[str, type[TriptychError]] = {kind.__name__: kind for kind in _leaves(TriptychError)}
"""Class by name: how an error that crossed a process boundary becomes itself again."""


def rebuild(kind: str, message: str, *, item: int | None = None) -> TriptychError:
    """The error that a peer reported by class name; a name that is not ours is a TriptychError."""
    cls = BY_NAME.get(kind, TriptychError)
    return cls(message, item=item)
