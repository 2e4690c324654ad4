"""Benchmarks that a user runs on their own machines: ``triptych bench``."""
