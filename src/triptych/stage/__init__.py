"""What all workers share: HTTP server, registration with the router, embeddings for the engine."""

from triptych.stage.shell import Service, Stage

__all__ = ["Service", "Stage"]
