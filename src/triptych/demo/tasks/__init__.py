"""A world of synthetic pictures and questions about them, drawn from seeds."""
