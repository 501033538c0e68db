"""Train small-data vision systems, export them as bundles, run those without PyTorch."""

__version__ = "0.1.0"
