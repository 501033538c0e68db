"""Measurements behind docs/benchmarks.md beside the rows of ``cli.py bench``."""
