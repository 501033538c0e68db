"""Whole systems behind the Open Inference Protocol: what clients of other programs speak to."""
