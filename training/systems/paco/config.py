"""Configuration of ``paco``; the defaults that are used stand in default.yaml.

Where a value was published with PaCo-2, it stands behind the field; the recommended one is the
default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from engineworks.runtime.confidence import BUDGET, COVERAGE
from engineworks.runtime.preprocess import PreprocessSpec
from engineworks.training.config import BackboneConfig, Config, SystemConfig

# of train.optimizer.lr, where it is null
RATE = 3e-4
RATE_FROZEN = 3e-3


class ViewsConfig(Config):
    """How one picture becomes two views.

    Attributes:
        crop_area: (low, high) share of the picture's area in a random crop (published: no crop at
            all, both views the same centre).
        crop_ratio: (low, high) of its width over its height.
        flip: probability of a horizontal flip.
        operations: light colour and geometry changes per view, drawn with replacement; 0 is none
            (published: 2).
        occlusion: probability that a square, a quarter of the second view's side wide, becomes its
            mean (published: 0.3).
        shuffle: probability that four pairs of 16 x 16 patches of the second view change places
            (published: 0.3).
        cache_bytes: decoded pictures that each loader process keeps, shrunk to what the crops
            need; 0 decodes anew in every epoch.
    """

    crop_area: tuple[float, float] = (0.5, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: float = Field(default=0.5, ge=0, le=1)
    operations: int = Field(default=2, ge=0)
    occlusion: float = Field(default=0.3, ge=0, le=1)
    shuffle: float = Field(default=0.3, ge=0, le=1)
    cache_bytes: int = Field(default=2**30, ge=0)

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise ValueError("crop_area must be (low, high) with 0 < low <= high <= 1")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError("crop_ratio must be (low, high) with 0 < low <= high")
        return self


class PartsConfig(Config):
    """Where in the last feature map the parts are, and how they are described.

    Attributes:
        num: K, parts per view (published: 4).
        window: r, side in cells of the window whose mean is a part (published: 5; odd).
        radius: suppression around a peak in cells: peaks are at least ``radius + 1`` apart in
            row or column (published: a tenth of the map, which is 0 on a 7 x 7 map, so that the
            parts are neighbours).
        width: d, of a part after the 1 x 1 reduction (published: 64).
        refresh: steps between two searches for the peaks of a picture; in between its last ones
            are moved along with the crop (published: 1).
    """

    num: int = Field(default=4, ge=2)
    window: int = Field(default=3, ge=1)
    radius: int = Field(default=1, ge=0)
    width: int = Field(default=64, ge=1)
    refresh: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _odd(self) -> Self:
        if self.window % 2 == 0:
            raise ValueError("window must be odd")
        return self


class LossConfig(Config):
    """L = weighted CE + lambda PaC + eta SoC.

    Attributes:
        pac: lambda, weight of the part contrast (published: 0.3 to 1).
        soc: eta, weight of the second-order consistency (published: 0.1).
        warmup_epochs: lambda and eta grow linearly from 0 over these epochs (published: 0).
        margin: alpha of the hinge (published: 0.2, on distances of no fixed scale).
        normalise: parts get length 1 and distances are divided by sqrt(trace(M^-1) / d), so that
            the margin means the same for every net, width and metric (published: false).
        metric: whose covariance a distance is measured in. ``pair``: of the two views' own parts
            (published; its span holds p - q, so the hinge is satisfied before anything is
            learnt). ``batch``: mean over the other pictures of the batch. ``class``: running mean
            of the picture's class, ``global`` of all pictures; until the first update both are
            the batch's. All but ``pair`` take no gradient. ``euclid``: the identity.
        shrinkage: rho: (1 - rho) S + rho trace(S) / d I; null uses ``ridge`` instead.
        ridge: epsilon: added to the diagonal of each view's covariance, and tau: once more to
            their mean (published: 1e-5 or 1e-2 each); never less than the rounding of the numbers.
        mining: ``semi-hard`` (nearest negative beyond the positive, or the nearest of all) or
            ``hardest``.
        top_m: null mines among all negatives, exactly. A number mines only among the M of
            largest cosine (published: 32 or 64); the loss may differ.
        pool_cap: at most so many pictures of the batch give negatives to each picture, the next
            ones in the batch's (random) order; null is all.
        matching: metric in which parts of the two views are matched after
            ``matching_warmup_epochs`` (published: 3; cosine before).
        soc_distance: between covariances; its square enters the loss.
        soc_normalise: covariances are divided by their trace, so that shrinking all features
            gains nothing (published: false).
        prototype: beta, weight of the distance to the class's running covariance (published:
            0.05); 0 keeps no prototypes for it. Classes not seen before are left out.
        momentum: of all running covariances, once per class and batch (published: 0.9).
        saliency: gamma: share of each sample's cross-entropy that is weighted by its normalised,
            detached saliency (published: 0.1, not normalised, with gradient).
        label_smoothing: of the cross-entropy (published: 0).
    """

    pac: float = Field(default=0.3, ge=0)
    soc: float = Field(default=0.1, ge=0)
    warmup_epochs: float = Field(default=5.0, ge=0)
    margin: float = Field(default=0.2, ge=0)
    normalise: bool = True
    metric: Literal["pair", "batch", "class", "global", "euclid"] = "global"
    shrinkage: float | None = Field(default=0.2, gt=0, le=1)
    ridge: float = Field(default=1e-5, gt=0)
    mining: Literal["semi-hard", "hardest"] = "semi-hard"
    top_m: int | None = Field(default=None, ge=1)
    pool_cap: int | None = Field(default=None, ge=1)
    matching: Literal["cosine", "metric"] = "metric"
    matching_warmup_epochs: int = Field(default=3, ge=0)
    soc_distance: Literal["fro", "log-euclidean", "stein"] = "fro"
    soc_normalise: bool = True
    prototype: float = Field(default=0.05, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    saliency: float = Field(default=0.0, ge=0, le=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


class ConfidenceConfig(Config):
    """What the folder ``val`` is to promise; see ``runtime.confidence``.

    Attributes:
        coverage: share of pictures whose class is in their prediction set.
        budget: share of pictures of known classes that may be called unknown.
    """

    coverage: float = Field(default=COVERAGE, gt=0, lt=1)
    budget: float = Field(default=BUDGET, gt=0, lt=1)


class TaskConfig(SystemConfig):
    """A classifier on a timm backbone, trained with part contrast.

    Attributes:
        backbone: the net up to its last feature map, or to one of its stages.
        preprocess: pixels to network input, for evaluation and inference.
        frozen: train the classifier alone, on features computed once (a linear probe); views,
            parts and loss are not used, except for ``loss.label_smoothing``.
        warm_start: folder of another run of the same net and classes, e.g. of one with ``frozen``,
            whose kept weights this one begins with; null begins with the backbone's weights and
            a random classifier.
        views, parts, loss: see there; ``loss.pac = 0`` and ``loss.soc = 0`` leave two-view
            cross-entropy.
        train: where ``optimizer.lr`` is null it becomes 3e-4, or 3e-3 for a classifier alone, which
            the smaller rate would leave far from where it is going.
        confidence: how sure answers may be; fitted where there is a folder ``val``.
        num_overlays: pictures of the validation set on which the parts are drawn at the end.
    """

    system: Literal["paco"] = "paco"
    backbone: BackboneConfig
    preprocess: PreprocessSpec
    frozen: bool = False
    warm_start: str | None = None
    views: ViewsConfig = ViewsConfig()
    parts: PartsConfig = PartsConfig()
    loss: LossConfig = LossConfig()
    confidence: ConfidenceConfig = ConfidenceConfig()
    num_overlays: int = Field(default=16, ge=0)

    @classmethod
    def settled(cls, tree: Mapping[str, Any]) -> Mapping[str, Any]:
        """With a rate where it is null: the one that fits what learns."""
        match tree:
            case {"train": {"optimizer": {"lr": None}}}:
                rate = RATE_FROZEN if tree.get("frozen") is True else RATE
                optimizer = {**tree["train"]["optimizer"], "lr": rate}
                return {**tree, "train": {**tree["train"], "optimizer": optimizer}}
        return tree

    @field_validator("backbone")
    @classmethod
    def _one_map(cls, backbone: BackboneConfig) -> BackboneConfig:
        if backbone.stages is not None and len(backbone.stages) > 1:
            raise ValueError("a classifier stands on one map: leave stages at null, or name one")
        return backbone
