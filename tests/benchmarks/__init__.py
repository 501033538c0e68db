"""Measurements behind docs/benchmarks.md and docs/journal.md beside ``cli.py bench``."""
