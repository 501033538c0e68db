"""Configuration of ``refdet``; the defaults that are used stand in default.yaml."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from runtime.preprocess import PreprocessSpec
from runtime.systems.refdet import InferenceConfig
from training.config import BackboneConfig, Config, SystemConfig


class EncoderConfig(BackboneConfig):
    """What turns references into prototypes: any net of timm, and a projection per scale.

    Attributes:
        train_blocks: so many of its last blocks learn; ``all``: the whole net.
        cache_bytes: a net that is frozen as a whole (0) sees a picture once: so much of what it
            said is kept, across the whole run.
    """

    train_blocks: int | Literal["all"] = 0
    cache_bytes: int = Field(default=2**28, ge=0)

    @field_validator("stages")
    @classmethod
    def _taken_whole(cls, stages: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if stages is not None:
            raise ValueError("an encoder is taken whole: leave stages at null")
        return stages


class DetectorConfig(Config):
    """The net that sees the frames.

    Attributes:
        width, depth: of backbone and neck; 0.25 and 0.33 are YOLOv8n's.
        scales: that boxes are found at, ascending: stride 2 ** scale (published: 2 to 5).
        widths: of the prototype's part of each scale; null: the channels of its map.
        fusion: ``psalm``, ``cheaf`` or ``none``.
        outputs: channels of each scale behind the fusion; null: as before it (published: 128, 256,
            512, 512).
        reg_max: bins of the distribution of a box side; 1: plain distances.
        separable: depthwise convolutions in the head.
        temperature: that cosines are multiplied by in the beginning.
        prior: score of an anchor in the beginning.
        checkpointing, channels_last, compile: see ``training.config.BackboneConfig``.
    """

    width: float = Field(default=0.25, gt=0)
    depth: float = Field(default=0.33, gt=0)
    scales: tuple[Literal[2, 3, 4, 5], ...] = Field(default=(3, 4, 5), min_length=1)
    widths: tuple[int, ...] | None = None
    fusion: Literal["psalm", "cheaf", "none"] = "psalm"
    outputs: tuple[int, ...] | None = None
    reg_max: int = Field(default=16, ge=1)
    separable: bool = True
    temperature: float = Field(default=10.0, gt=0)
    prior: float = Field(default=0.01, gt=0, lt=1)
    checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False

    @model_validator(mode="after")
    def _one_per_scale(self) -> Self:
        if list(self.scales) != list(range(self.scales[0], self.scales[-1] + 1)):
            raise ValueError("scales must ascend without a gap")
        for name in ("widths", "outputs"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.scales):
                raise ValueError(f"{name} must have one value per scale")
        return self


class LossConfig(Config):
    """What the losses of ``loss.py`` are made of; how much each weighs is a stage's.

    Attributes:
        box: ``wiou-v1``, ``-v2``, ``-v3`` (names of the paper), or ``ciou``.
        gamma: of the classes' cross-entropy, how little counts what is right already; 0 is plain.
        top_k: anchors per box.
        alpha, beta: an anchor is ranked by ``score ** alpha * IoU ** beta`` (published: 1 and 6).
        temperature: of prototype and supervised contrast (published: 0.07).
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
    temperature: float = Field(default=0.1, gt=0)
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

    box: float = Field(default=5.0, ge=0)
    dfl: float = Field(default=1.0, ge=0)
    cls: float = Field(default=1.0, ge=0)
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


class RatesConfig(Config):
    """Factors of ``train.optimizer.lr``; a net that starts from good weights wants less.

    Attributes:
        encoder: of the encoder's net; its projections learn like the head.
    """

    encoder: float = Field(default=0.1, gt=0)
    backbone: float = Field(default=1.0, gt=0)
    fusion: float = Field(default=2.0, gt=0)
    head: float = Field(default=2.0, gt=0)


class TaskConfig(SystemConfig):
    """A detector of objects that it is shown pictures of.

    Attributes:
        preprocess: frames to network input.
        reference_preprocess: references to network input.
        base: a second branch of the head learns to find the training objects by name, without
            references.
        num_candidates: best anchors of a frame that leave the network.
        encoder, detector, loss, stages, rates, inference: see there.
    """

    system: Literal["refdet"] = "refdet"
    preprocess: PreprocessSpec
    reference_preprocess: PreprocessSpec
    encoder: EncoderConfig
    detector: DetectorConfig = DetectorConfig()
    base: bool = False
    num_candidates: int = Field(default=300, ge=1)
    loss: LossConfig = LossConfig()
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    rates: RatesConfig = RatesConfig()
    inference: InferenceConfig = InferenceConfig()

    @field_validator("stages")
    @classmethod
    def _in_order(cls, stages: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
        starts = [stage.start for stage in stages]
        if starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError("the first stage must start at 0, and each other after the one before")
        return stages
