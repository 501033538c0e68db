"""Measurements behind docs/benchmarks.md and docs/journal.md beside the rows of ``cli.py bench``."""
