"""Everything here needs a CUDA device; without one it is skipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Before anybody imports FlashInfer, which reads it once: kernels take a minute to be built, and
# otherwise each process, and each test's folder of compiled code, would have them built anew.
os.environ.setdefault("FLASHINFER_WORKSPACE_BASE", str(Path.home()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
