"""Configuration of ``noising``; the defaults that are used stand in default.yaml."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from runtime.preprocess import PreprocessSpec
from runtime.systems.noising import FitConfig
from training.config import BackboneConfig, SystemConfig


class TaskConfig(SystemConfig):
    """What a memory bank of normal patch features is made of.

    Attributes:
        backbone: the frozen net; only convolutional nets have the maps that this needs.
        preprocess: pixels to network input; must be what the backbone was trained with.
        width: feature width D after pooling along the channels; null keeps all channels.
        fit: bank, signals and thresholds.
    """

    system: Literal["noising"] = "noising"
    backbone: BackboneConfig
    preprocess: PreprocessSpec
    width: int | None = Field(default=None, ge=1)
    fit: FitConfig = FitConfig()
