"""One line per log record, on stderr, with the role and the process in it."""

from __future__ import annotations

import logging
import os
import sys


def setup(role: str, level: int = logging.INFO) -> None:
    """Send every record of this process to stderr: ``time level role[pid] logger: message``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname)s {role}[{os.getpid()}] %(name)s: %(message)s")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # Servers that poll /ready and /metrics would fill the log with one line each.
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
