"""A decoded image's pixels as a tensor, from where Pillow has them, and as the model wants them.

Pillow packs pixels into bytes with Python's lock held, copies them twice, and lets threads that
prepare images wait for each other there. It also hands its memory out as it is, by Arrow's C data
interface, which takes microseconds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor


class _ArrowArray(ctypes.Structure):
    """``struct ArrowArray`` of Arrow's C data interface."""


_ArrowArray._fields_ = [
    ("length", ctypes.c_int64),
    ("null_count", ctypes.c_int64),
    ("offset", ctypes.c_int64),
    ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
    ("dictionary", ctypes.c_void_p),
    ("release", ctypes.c_void_p),
    ("private_data", ctypes.c_void_p),
]

_address_in = ctypes.pythonapi.PyCapsule_GetPointer
_address_in.restype = ctypes.c_void_p
_address_in.argtypes = [ctypes.py_object, ctypes.c_char_p]


class _Lent:
    """Pillow's memory, kept for as long as an array of it lives."""

    def __init__(self, image: Image.Image) -> None:
        """Raises ValueError: the rows lie in several places."""
        _, self._capsule = image.__arrow_c_array__()  # gives the memory back when it is collected
        address = _address_in(self._capsule, b"arrow_array")
        # Of each pixel's four values: no validity bitmap, then the values.
        values = ctypes.cast(address, ctypes.POINTER(_ArrowArray)).contents.children[0].contents
        self.__array_interface__: dict[str, Any] = {
            "data": (values.buffers[1], False),
            "shape": (image.height, image.width, 4),
            "typestr": "|u1",
            "version": 3,
        }


def pixels(image: Image.Image) -> Tensor:
    """(height, width, 4) uint8 of an RGB image, to be read only: red, green, blue and nothing.

    A view of Pillow's own memory. Of an image that Pillow keeps in several blocks it is a copy,
    (height, width, 3).
    """
    assert image.mode == "RGB", "decoded images are RGB"
    try:
        return torch.from_numpy(np.asarray(_Lent(image)))
    except ValueError:
        return torch.from_numpy(np.array(image))


def normalized(
    image: NDArray[np.float32], mean: float | Sequence[float], std: float | Sequence[float]
) -> NDArray[np.float32]:
    """``(image - mean) / std`` of (channels, height, width), of one mean and deviation or one of
    each channel. To the bit what Transformers' PIL processors compute, but row by row where pixels
    lie as a file has them: theirs takes three numbers at a time, ten times as long.
    """
    channels, height, width = image.shape
    given = [np.broadcast_to(np.asarray(each, image.dtype), channels) for each in (mean, std)]
    rows = np.ascontiguousarray(image.transpose(1, 2, 0)).reshape(height, -1)
    found = rows - np.tile(given[0], width)
    found /= np.tile(given[1], width)
    return found.reshape(height, width, channels).transpose(2, 0, 1)
