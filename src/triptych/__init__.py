"""Triptych serves vision-language models with Encode, Prefill and Decode apart (E/P/D)."""

__version__ = "0.1.0"
