"""Configuration of ``refdet``; the defaults that are used stand in default.yaml."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from engineworks.runtime.preprocess import PreprocessSpec
from engineworks.runtime.systems.refdet.detecting import InferenceConfig
from engineworks.training.config import BackboneConfig, Config, SystemConfig

STRIDE = 32  # of the detector's backbone


class EncoderConfig(BackboneConfig):
    """What turns references into prototypes: any net of timm, and a projection per scale.

    Attributes:
        train_blocks: so many of its last blocks learn; ``all``: the whole net.
        cache_bytes: a net that is frozen as a whole (0) sees a picture once: so much of what it
            said is kept, across the whole run.
    """

    train_blocks: NonNegativeInt | Literal["all"] = 0
    cache_bytes: int = Field(default=2**28, ge=0)


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
        if self.scales == (2,):
            raise ValueError("scale 2 alone has no neck: add scale 3")
        for name in ("widths", "outputs"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.scales):
                raise ValueError(f"{name} must have one value per scale")
        return self


class FollowConfig(Config):
    """How an object of a video is looked for around its last place, by the same net.

    Attributes:
        size: (height, width) of the picture that is searched, in pixels of the net's input.
        share: of its shorter side, that the object's longer side took before.
        num_sizes: of boxes, about that of the object.
        step: each is so many times as large as the one before.
        score, bias: as of ``MatchConfig``.
        every, most, nearness, steadiness, agility: see
            ``runtime.systems.refdet.detecting.FollowParams``.
    """

    size: tuple[int, int] = (192, 192)
    share: float = Field(default=0.4, gt=0, le=1)
    num_sizes: int = Field(default=5, ge=1, le=64)
    step: float = Field(default=2**0.25, gt=1)
    score: tuple[float, float, float, float, float] = (1.0, 0.0, 0.0, 0.0, 0.0)
    bias: float = 0.0
    every: int = Field(default=15, ge=1)
    most: int = Field(default=1, ge=1)
    nearness: float = Field(default=1.0, ge=0)
    steadiness: float = Field(default=1.0, ge=0)
    agility: float = Field(default=0.5, gt=0, le=1)

    @field_validator("size")
    @classmethod
    def _whole_cells(cls, size: tuple[int, int]) -> tuple[int, int]:
        if min(size) < STRIDE or any(side % STRIDE for side in size):
            raise ValueError(f"sides must be multiples of {STRIDE}")
        return size

    @property
    def sizes(self) -> tuple[float, ...]:
        """Longer sides of boxes, ascending."""
        middle = self.share * min(self.size)
        first = (1 - self.num_sizes) / 2
        return tuple(middle * self.step ** (first + i) for i in range(self.num_sizes))


class RelationConfig(Config):
    """What learns to judge the candidates of matching; see ``relation.py``.

    Attributes:
        parts: rows and columns of parts of an object; a divisor of ``MatchConfig.cells``.
        window: rows and columns of places over a candidate.
        margin: side of their window, in sides of the candidate's box.
        width: of the two hidden layers.
        dropout: share of the places that a step does not see.
        frames: so many, evenly spread, are learned from; null: all.
        candidates: of an object in a frame that are learned from, at most.
        absent: objects that a frame is also searched for though they are not in it.
        kept_back: share of the objects that are not learned: ``conf`` is fitted on them.
        synthesis: frames with objects pasted into them, as a share of the frames.
        right: overlap from which a candidate is the object; below ``wrong`` it is not.
        wrong: see ``right``.
        box: weight of the loss of boxes.
        share: of what is learned in a candidate's logit, beside the whole of what matching says of
            it; null: what is learned judges alone, as in runs before it. Whatever it is, the boxes
            are those that were learned.
    """

    parts: int = Field(default=3, ge=1)
    window: int = Field(default=10, ge=2, le=32)
    margin: float = Field(default=2.0, gt=0)
    width: int = Field(default=64, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    frames: int | None = Field(default=None, ge=1)
    candidates: int = Field(default=24, ge=1)
    absent: int = Field(default=2, ge=0)
    kept_back: float = Field(default=0.1, ge=0, lt=1)
    synthesis: float = Field(default=0.5, ge=0)
    right: float = Field(default=0.4, gt=0, le=1)
    wrong: float = Field(default=0.3, ge=0, le=1)
    box: float = Field(default=1.0, ge=0)
    share: float | None = Field(default=None, ge=0)


class KindConfig(Config):
    """What kind of thing a candidate is, by the encoder's deepest map over its box.

    Attributes:
        stage: of the encoder, behind ``encoder.stages``.
        factor: of the cosine to the references, in a candidate's logit.
        usual: cosine at which nothing is added.
        ground: training frames, evenly spread, whose places beside all labelled boxes say what
            kinds have in common with what is no object: it is taken from both before they are
            compared. 0: nothing is, as in runs before it, and where there is nothing to train on.
    """

    stage: NonNegativeInt
    factor: float = Field(ge=0)
    usual: float = Field(default=0.5, ge=-1, le=1)
    ground: int = Field(default=0, ge=0)


class MatchConfig(Config):
    """A detector that compares maps of one frozen net, ``encoder``, and learns next to nothing.

    Attributes:
        cells: a template has so many rows and columns.
        scales: references are also seen this much smaller, falling to 1.
        smallest: longer side of the smallest boxes that are looked for, in pixels of the net's
            input.
        step: each further size is so many times as large.
        num_sizes: of boxes.
        softening: is added to the deviation of similarities, which in an even frame is nothing.
        unit: size that the score's term for the size is 0 at.
        score: factors of what a score is made of, in the beginning: similarity in deviations from
            the frame's mean, the similarity itself, that mean, the deviation, and the logarithm of
            the size.
        bias: of it.
        object_share: share of a reference picture that the object's longer side takes.
        follow: how objects of a video are followed; null: every frame is searched whole.
        kind: what candidates are judged by once more; null: by nothing, as runs before it.
        relation: what is learned to judge candidates by; null: nothing is.
    """

    cells: int = Field(default=6, ge=1, le=16)
    scales: tuple[Annotated[int, Field(ge=1, le=16)], ...] = Field(default=(4, 2, 1), min_length=1)
    smallest: float = Field(default=20.0, gt=0)
    step: float = Field(default=2**0.5, gt=1)
    num_sizes: int = Field(default=9, ge=1, le=64)
    softening: float = Field(default=0.02, gt=0)
    unit: float = Field(default=80.0, gt=0)
    score: tuple[float, float, float, float, float] = (1.0, 0.0, 0.0, 0.0, 0.5)
    bias: float = 0.0
    object_share: float = Field(default=0.625, gt=0, le=1)
    follow: FollowConfig | None = None
    kind: KindConfig | None = None
    relation: RelationConfig | None = None

    @model_validator(mode="after")
    def _whole_parts(self) -> Self:
        if self.relation is not None and self.cells % self.relation.parts:
            raise ValueError("match.cells must be a multiple of match.relation.parts")
        return self

    @field_validator("scales")
    @classmethod
    def _falling(cls, scales: tuple[int, ...]) -> tuple[int, ...]:
        if list(scales) != sorted(set(scales), reverse=True):
            raise ValueError("scales must fall")
        return scales

    @property
    def sizes(self) -> tuple[float, ...]:
        """Longer sides of boxes, ascending."""
        return tuple(self.smallest * self.step**i for i in range(self.num_sizes))


class EpisodesConfig(Config):
    """What a step of training sees: frames, and pictures of what they are searched for.

    A step's ``train.batch_size`` frames are drawn first: for each an object, then a frame with it.
    What is searched for are the objects seen in them, filled up with objects that are not.

    Attributes:
        num: steps per epoch; null: as many as show every frame ``coverage`` times, from 10 to 1000.
        coverage: see ``num``.
        ways: so many different objects are drawn for the frames; null: one for each.
        objects: searched for, at most: N.
        shots: references of each: K.
        prompted: (least, most) share of them that one frame is searched for; in the others it has
            no say.
        positive: probability that at least one of these is seen in the frame, where any is.
        cache_bytes: of decoded frames and references that each loader process keeps.
    """

    num: int | None = Field(default=None, ge=1)
    coverage: float = Field(default=1.0, gt=0)
    ways: int | None = Field(default=None, ge=1)
    objects: int = Field(default=8, ge=1)
    shots: int = Field(default=3, ge=1)
    prompted: tuple[float, float] = (0.3, 1.0)
    positive: float = Field(default=0.7, ge=0, le=1)
    cache_bytes: int = Field(default=2**29, ge=0)

    @field_validator("prompted")
    @classmethod
    def _shares(cls, prompted: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= prompted[0] <= prompted[1] <= 1:
            raise ValueError("prompted must be (least, most) with 0 <= least <= most <= 1")
        return prompted


class AugmentConfig(Config):
    """How frames and references differ from how they were taken.

    Attributes:
        recolour: probability that a whole step, frames and references alike, changes its colours:
            channels exchanged, inverted and mixed. It makes objects that are in no picture; not for
            a net that is frozen, which knows objects by their true colours.
        recolours: so many different changes, so that features of a frozen encoder can be kept.
        grey: share of these changes that leave no colour at all: only shape and pattern tell.
        turn: probability that a frame is turned by 0, 90, 180 or 270 degrees and perhaps mirrored.
        affine: probability that it is turned by up to ``degrees`` and zoomed by ``scale``.
        degrees: either way.
        scale: (low, high).
        light: largest change of brightness and of contrast, as a share.
        colour: largest change of each channel's brightness, as a share.
        hue: largest turn of all colours about the axis of the greys, in degrees.
        saturation: largest change of their distance from it, as a share.
        blur, noise, erase: probabilities that a frame is blurred, gets noise, or loses a rectangle.
        variants: of each reference; each is always the same, so that features can be kept.
        reference_turn: references are turned by 0, 90, 180 or 270 degrees as well; mirrored always
            are half of the variants.
        reference_crop: smallest share of a reference's sides that a variant shows.
    """

    recolour: float = Field(default=0.0, ge=0, le=1)
    recolours: int = Field(default=1000, ge=1)
    grey: float = Field(default=0.0, ge=0, le=1)
    turn: float = Field(default=0.5, ge=0, le=1)
    affine: float = Field(default=0.5, ge=0, le=1)
    degrees: float = Field(default=15.0, ge=0, le=180)
    scale: tuple[float, float] = (0.8, 1.2)
    light: float = Field(default=0.2, ge=0, lt=1)
    colour: float = Field(default=0.1, ge=0, lt=1)
    hue: float = Field(default=0.0, ge=0, le=180)
    saturation: float = Field(default=0.0, ge=0, le=1)
    blur: float = Field(default=0.1, ge=0, le=1)
    noise: float = Field(default=0.1, ge=0, le=1)
    erase: float = Field(default=0.1, ge=0, le=1)
    variants: int = Field(default=4, ge=1)
    reference_turn: bool = False
    reference_crop: float = Field(default=0.85, gt=0, le=1)

    @field_validator("scale")
    @classmethod
    def _zoom(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError("scale must be (low, high) with 0 < low <= high")
        return scale


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
    """What each loss weighs; a contrast that weighs 0 is not computed.

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
        hold_out: objects that training must not see; see ``runtime.objects.read_objects``.
        match: compare maps of the encoder's net instead of training a detector; null: the detector.
        base: a second branch of the head learns to find the training objects by name, without
            references.
        warm_start: folder of another run, from whose ``match.relation`` this one goes on.
        num_candidates: best anchors of a frame that leave the network; in matching, of each object.
        encoder, detector, episodes, augment, loss, stages, rates, inference: see there.
    """

    system: Literal["refdet"] = "refdet"
    preprocess: PreprocessSpec
    reference_preprocess: PreprocessSpec
    encoder: EncoderConfig
    detector: DetectorConfig = DetectorConfig()
    match: MatchConfig | None = None
    hold_out: tuple[str, ...] = ()
    base: bool = False
    episodes: EpisodesConfig = EpisodesConfig()
    augment: AugmentConfig = AugmentConfig()
    warm_start: str | None = None
    num_candidates: int = Field(default=300, ge=1)
    loss: LossConfig = LossConfig()
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    rates: RatesConfig = RatesConfig()
    inference: InferenceConfig = InferenceConfig()

    @field_validator("preprocess")
    @classmethod
    def _whole_cells(cls, preprocess: PreprocessSpec) -> PreprocessSpec:
        if any(side % STRIDE for side in preprocess.size):
            raise ValueError(f"sides of a frame must be multiples of {STRIDE}")
        return preprocess

    @model_validator(mode="after")
    def _maps_to_match(self) -> Self:
        if self.match is None and self.encoder.stages is not None:
            raise ValueError("the detector's encoder is taken whole: leave encoder.stages at null")
        if self.match is not None and self.match.kind is not None:
            stages, stage = self.encoder.stages, self.match.kind.stage
            if stages is None or stage <= max(stages):
                raise ValueError("name encoder.stages, and match.kind.stage behind them (or null)")
        if self.match is not None and self.base:
            raise ValueError("matching knows no base classes: set base to false")
        return self

    @property
    def task_module(self) -> str:
        if self.match is None:
            return "task"
        return "match_task" if self.match.relation is None else "relation_task"

    @field_validator("stages")
    @classmethod
    def _in_order(cls, stages: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
        starts = [stage.start for stage in stages]
        if starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError("the first stage must start at 0, and each other after the one before")
        return stages
