"""Configuration of ``noising``; the defaults that are used stand in default.yaml."""

from __future__ import annotations

from typing import Literal, Self, TypeAlias

from pydantic import Field, model_validator

from engineworks.runtime.preprocess import PreprocessSpec
from engineworks.runtime.systems.noising.fit import FitConfig
from engineworks.runtime.systems.noising.tiles import Tiles
from engineworks.training.config import BackboneConfig, Config, SystemConfig

Neighbourhood: TypeAlias = Literal["zeros", "inside", "none"]
Scale: TypeAlias = Literal["roots", "unit", "none"]


class AugmentConfig(Config):
    """How a normal picture is changed, as it might have been taken as well.

    Attributes:
        flip: mirrored along each axis in half of the cases; for parts without an up and a left.
        rotation: by up to so many degrees either way; corners are filled by reflection.
        brightness: all values times 1 - b to 1 + b.
    """

    flip: bool = False
    rotation: float = Field(default=0.0, ge=0, le=180)
    brightness: float = Field(default=0.0, ge=0, lt=1)


class CopiesConfig(AugmentConfig):
    """Changed copies of each normal picture, which join the bank.

    Attributes:
        num: of each picture.
    """

    num: int = Field(default=4, ge=1)


class DiscriminatorConfig(Config):
    """A small net that tells normal patches from the same with proposed noise.

    Attributes:
        hidden: width of its one hidden layer.
        steps: optimizer steps per epoch.
        patches: normal patches per step; as many with noise join them.
        reach: (shortest, longest) noise, drawn evenly in the logarithm; 1 is the root mean square
            distance of normal patches to their neighbours.
        neighbours: of a patch, for its influence and its distance.
        rows: of the memory bank that noise is proposed with; it stays with the run.
        searched: the bank is a coreset of so many patches.
        adversary: learning rate of the noise's shares, relative to that of the net.
        augment: null: the features of the pictures as they are, computed once. Else features of
            ``train.batch_size`` changed pictures, computed anew in each step.
    """

    hidden: int = Field(default=256, ge=1)
    steps: int = Field(default=400, ge=1)
    patches: int = Field(default=512, ge=1)
    reach: tuple[float, float] = (1.0, 4.0)
    neighbours: int = Field(default=9, ge=1)
    rows: int = Field(default=2048, ge=1)
    searched: int = Field(default=16384, ge=1)
    adversary: float = Field(default=10.0, ge=0)
    augment: AugmentConfig | None = None

    @model_validator(mode="after")
    def _reaches(self) -> Self:
        if not 0 < self.reach[0] <= self.reach[1]:
            raise ValueError("reach must be (shortest, longest), both above 0")
        return self


class TaskConfig(SystemConfig):
    """What judges patch features, and how it is made of normal ones.

    Attributes:
        backbone: the frozen net, cut at stages whose maps are the layers; of a plain transformer
            these are its blocks, without the tokens that are no patches.
        preprocess: pixels to network input; must be what the backbone was trained with.
        stride: pixels from patch to patch, at most: of the maps that are as fine, the coarsest has
            the patches; finer ones are averaged to its grid, coarser ones enlarged. The finest map
            has them where none is as fine, or, as in runs that do not say, where it is null.
        deep: what features of maps coarser than that are multiplied by, which say more of the
            whole part and less of a small defect; not with scale=unit.
        width: feature width D after pooling along the channels; null keeps all channels.
        neighbourhood: a patch is the mean of the 3x3 around it. ``zeros``: in each map by itself,
            with zeros beyond its border; ``inside``: of all maps together, and at the border of the
            part inside, as runs are that do not say; ``none``: the patch alone.
        scale: ``roots``: signed square roots of the features, and of their length;
            ``unit``: of length 1 in each map, so that distances are those of cosines; ``none``: as
            they are, and as in runs that do not say.
        copies: null: the bank holds the pictures as they are; else changed copies as well, for
            parts that lie turned, light that varies, or few pictures.
        tiles: null: each picture is brought to ``preprocess.size``. Else it is covered by tiles of
            that size at its own resolution, which overlap, for small defects in large pictures.
        judge: ``bank``: the distance to a memory bank, and what belongs to it. ``discriminator``:
            a trained net in its place, one graph with the backbone; the bundle has no bank.
        fit: bank, signals and thresholds; of these the discriminator takes ``smoothing``,
            ``folds``, ``statistics_images`` and ``false_reject``, and holds out one fold.
        discriminator: read where it is the judge.
    """

    system: Literal["noising"] = "noising"
    backbone: BackboneConfig
    preprocess: PreprocessSpec
    stride: float | None = Field(default=None, ge=1)
    deep: float = Field(default=1.0, gt=0, le=1e3)
    width: int | None = Field(default=None, ge=1)
    neighbourhood: Neighbourhood = "inside"
    scale: Scale = "none"
    copies: CopiesConfig | None = None
    tiles: Tiles | None = None
    judge: Literal["bank", "discriminator"] = "bank"
    fit: FitConfig = FitConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()

    @model_validator(mode="after")
    def _fits_layers(self) -> Self:
        if self.scale == "unit" and (self.width is not None or self.neighbourhood == "inside"):
            raise ValueError(
                "scale=unit leaves features as long as they are: width must be null and "
                "neighbourhood zeros or none"
            )
        if self.fit.layers and self.scale != "unit":
            raise ValueError("fit.layers compares by cosines: set scale to unit")
        if self.judge != "bank" and (self.fit.layers or self.fit.foreground):
            raise ValueError("fit.layers and fit.foreground are for judge=bank")
        return self

    @model_validator(mode="after")
    def _fits_tiles(self) -> Self:
        if self.tiles is None:
            return self
        if self.judge != "bank" or self.fit.foreground or self.fit.window is not None:
            raise ValueError("tiles are for judge=bank, without fit.foreground and fit.window")
        if 2 * self.tiles.overlap > min(self.preprocess.size):
            raise ValueError("tiles.overlap must be at most half of preprocess.size")
        return self
