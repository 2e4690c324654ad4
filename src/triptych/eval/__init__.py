"""``triptych eval``: questions in MMMU's format, asked of an OpenAI-compatible server."""
