"""Configuration of ``stripe``; the defaults that are used stand in default.yaml.

Where a value was published with the three-channel net, it stands behind the field; the recommended
one is the default. Amplitudes are shares of the sensor's range (0.25 of 0 ... 255 is 64).
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from engineworks.runtime.systems.stripe import InferenceConfig
from engineworks.training.config import Config, SystemConfig


class KernelConfig(Config):
    """A Gaussian spot.

    Attributes:
        size: (rows, columns) of its box in pixels, both odd.
        sigma: (down, across) in pixels.
    """

    size: tuple[int, int]
    sigma: tuple[float, float]

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if any(side < 1 or side % 2 == 0 for side in self.size) or min(self.sigma) <= 0:
            raise ValueError("size must be two odd numbers, sigma two positive ones")
        return self


class DefectsConfig(Config):
    """What is painted into a tile.

    A defect in the target alone is to be found; one that a reference shows as well is not.

    Attributes:
        clean: share of tiles without any.
        num: (fewest, most) in the others.
        num_target_only: (fewest, most) of them to be found; at most half of all.
        absent: probability that one that is not to be found is missing in the target and only a
            reference has it (published: 0).
        shared_scale: (low, high) how strongly a reference shows what it shares with the target, as
            a factor (published: 1).
        leak: probability that one to be found also shows in one reference, weaker.
        leak_scale: (low, high) how weak, as a factor.
        amplitude: (low, high) of its peak; the sign is random, unless the range cuts it off.
        kernels: shapes, equally likely.
        margin: pixels from its centre to the border of the tile, at least.
        spacing: pixels between two boxes, at least.
    """

    clean: float = Field(default=0.5, ge=0, le=1)
    num: tuple[int, int] = (3, 8)
    num_target_only: tuple[int, int] = (1, 2)
    absent: float = Field(default=0.25, ge=0, le=1)
    shared_scale: tuple[float, float] = (0.6, 1.4)
    leak: float = Field(default=0.0, ge=0, le=1)
    leak_scale: tuple[float, float] = (0.2, 0.5)
    amplitude: tuple[float, float] = (0.235, 0.315)
    kernels: tuple[KernelConfig, ...] = Field(
        default=(
            KernelConfig(size=(3, 3), sigma=(1.3, 1.3)),
            KernelConfig(size=(3, 5), sigma=(1.0, 1.5)),
        ),
        min_length=1,
    )
    margin: int = Field(default=5, ge=0)
    spacing: int = Field(default=2, ge=0)

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if not 2 <= self.num[0] <= self.num[1]:
            raise ValueError("num must be (fewest, most) with 2 <= fewest <= most")
        low, high = self.num_target_only
        if not 1 <= low <= high or low > self.num[0] // 2:
            raise ValueError("num_target_only must be (fewest, most), fewest at most half of num's")
        for name, (low_share, high_share) in (
            ("amplitude", self.amplitude),
            ("shared_scale", self.shared_scale),
            ("leak_scale", self.leak_scale),
        ):
            if not 0 < low_share <= high_share:
                raise ValueError(f"{name} must be (low, high) with 0 < low <= high")
        return self


class DisturbanceConfig(Config):
    """How two captures of one place differ though nothing is wrong; each tile draws its own.

    Attributes:
        gain: largest change of a plane's contrast, either way, as a share.
        offset: largest change of its brightness, either way.
        noise: largest standard deviation of its own noise.
        shift: largest displacement of the target against both references along each axis, in
            pixels.
        spread: largest displacement of each reference beyond that.
        whole_pixels: round displacements instead of interpolating: for black and white pictures,
            whose edges would become grey.
        lines: probability of a line in one of the planes, the target included; it is no defect.
        line_amplitude: (low, high) of a line.
        flip: probability of each of the two mirrorings.
    """

    gain: float = Field(default=0.05, ge=0, lt=1)
    offset: float = Field(default=0.03, ge=0)
    noise: float = Field(default=0.02, ge=0)
    shift: float = Field(default=0.5, ge=0, le=8)
    spread: float = Field(default=0.5, ge=0, le=8)
    whole_pixels: bool = False
    lines: float = Field(default=0.1, ge=0, le=1)
    line_amplitude: tuple[float, float] = (0.05, 0.2)
    flip: float = Field(default=0.5, ge=0, le=1)


class TilesConfig(Config):
    """Which pieces of the strips are trained on.

    Attributes:
        size: side of a tile in pixels; a multiple of the network's stride.
        repeat: visits of every tile per epoch.
        jitter: largest displacement of a visit from the tile's place, in pixels.
        cache: folder that keeps the packed strips for other runs; null packs them into the run
            and removes them at its end.
    """

    size: int = Field(default=128, ge=16)
    repeat: int = Field(default=1, ge=1)
    jitter: int = Field(default=16, ge=0)
    cache: str | None = None


class NetworkConfig(Config):
    """Which network.

    Attributes:
        name: ``plain``: convolutions on cells of pixels, no pooling, no skips over scales.
            ``unet``: the published one; ``unet-se``: its later state, with pooled context and
            channel attention.
        width: channels; of a U-Net, of its first level (published: 64).
        depth: of ``plain``: 3 x 3 convolutions between the first layer and the last.
        cell: of ``plain``: side in pixels of what one position of its maps stands for.
    """

    name: Literal["plain", "unet", "unet-se"] = "plain"
    width: int = Field(default=32, ge=1)
    depth: int = Field(default=4, ge=1)
    cell: Literal[1, 2, 4] = 2

    @property
    def stride(self) -> int:
        """Heights and widths of the network's input must be multiples of it."""
        return self.cell if self.name == "plain" else 32


class LossConfig(Config):
    """Focal loss.

    Attributes:
        alpha: weight of defective pixels, 1 - alpha that of all others; null weights none
            (published: 0.75, which fell on the others).
        gamma: how little pixels count that are right already (published: 2).
    """

    alpha: float | None = Field(default=0.75, gt=0, lt=1)
    gamma: float = Field(default=2.0, ge=0)


class TaskConfig(SystemConfig):
    """A net that marks what only the target of three captures shows.

    Attributes:
        value_range: (low, high) of the sensor, in the files' own values. One linear rescale, the
            same in training, calibration and inference.
        tiles, network, defects, disturbances, loss, inference: see there.
    """

    system: Literal["stripe"] = "stripe"
    value_range: tuple[float, float] = (0.0, 255.0)
    tiles: TilesConfig = TilesConfig()
    network: NetworkConfig = NetworkConfig()
    defects: DefectsConfig = DefectsConfig()
    disturbances: DisturbanceConfig = DisturbanceConfig()
    loss: LossConfig = LossConfig()
    inference: InferenceConfig = InferenceConfig()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        low, high = self.value_range
        if not low < high:
            raise ValueError("value_range must be (low, high) with low < high")
        if self.tiles.size % self.network.stride:
            raise ValueError(f"tiles.size must be a multiple of {self.network.stride} for this net")
        return self
