"""Configuration of ``refdet``; the defaults that are used stand in default.yaml."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from training.config import Config


class LossConfig(Config):
    """What the losses of ``loss.py`` are made of; how much each weighs is a stage's.

    Attributes:
        box: ``wiou-v1``, ``-v2``, ``-v3`` (names of the paper), or ``ciou``.
        gamma: of the classes' cross-entropy, how little counts what is right already; 0 is plain.
        top_k: anchors per box.
        alpha, beta: an anchor is ranked by ``score ** alpha * IoU ** beta`` (published: 1 and 6).
        temperature: of prototype and supervised contrast.
        proposal_temperature: of the contrast of proposals.
        proposals: at most so many of a batch, drawn at random, are contrasted.
        min_iou: of a proposal with its box, to be another's positive.
        max_gap: between the IoUs of two proposals that are each other's positives.
        margin: of the triplets.
        contrastive_until: epoch after which the contrastive losses weigh ``contrastive_factor``
            times as much; null: never.
    """

    box: Literal["wiou-v1", "wiou-v2", "wiou-v3", "ciou"] = "wiou-v3"
    gamma: float = Field(default=0.0, ge=0)
    top_k: int = Field(default=10, ge=1)
    alpha: float = Field(default=1.0, ge=0)
    beta: float = Field(default=6.0, ge=0)
    temperature: float = Field(default=0.07, gt=0)
    proposal_temperature: float = Field(default=0.1, gt=0)
    proposals: int = Field(default=128, ge=2)
    min_iou: float = Field(default=0.5, ge=0, le=1)
    max_gap: float = Field(default=0.2, ge=0, le=1)
    margin: float = Field(default=0.3, ge=0)
    contrastive_until: int | None = Field(default=None, ge=0)
    contrastive_factor: float = Field(default=0.5, ge=0)


class WeightsConfig(Config):
    """What each loss weighs; one that weighs 0 is not computed.

    Attributes:
        box, dfl, cls: of the prototypes' branch.
        base: of all three once more, for the base classes' branch.
        prototype: contrast of an object's features with all prototypes of the episode.
        supervised: contrast of objects' features with each other.
        proposals: the same of predicted boxes.
        triplet: prototype against its object and the nearest thing that is not.
    """

    box: float = Field(default=7.5, ge=0)
    dfl: float = Field(default=1.5, ge=0)
    cls: float = Field(default=0.5, ge=0)
    base: float = Field(default=1.0, ge=0)
    prototype: float = Field(default=0.0, ge=0)
    supervised: float = Field(default=0.0, ge=0)
    proposals: float = Field(default=0.0, ge=0)
    triplet: float = Field(default=0.0, ge=0)


class StageConfig(Config):
    """A part of the training.

    Attributes:
        name: for the record.
        start: first epoch, from 0; it lasts until the next stage starts.
        lr: factor of all learning rates.
        frozen: parts of the model that stay as they are.
        weights: of the losses.
    """

    name: str
    start: int = Field(default=0, ge=0)
    lr: float = Field(default=1.0, gt=0)
    frozen: tuple[Literal["encoder", "backbone", "fusion", "head"], ...] = ()
    weights: WeightsConfig = WeightsConfig()


class CacheConfig(Config):
    """Features of a frozen encoder, kept across the whole run.

    Attributes:
        max_bytes: the least recently used ones make room.
    """

    max_bytes: int = Field(default=2**28, ge=0)
