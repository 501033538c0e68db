"""Pixels to tensors: the only such code in the project.

Training's evaluation, calibration, the INT8 gate and inference all call ``apply`` with the
``PreprocessSpec`` that travels in the bundle, so what a network sees cannot differ between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from engineworks.runtime import budgets
from engineworks.runtime.errors import InputError
from engineworks.runtime.planes import check_planes
from engineworks.runtime.tensors import Array

# a network's input is made for a batch at once: no picture needs more, and a wrong one takes it all
_MAX_SIDE, _MAX_AREA = 1 << 16, 1 << 24
Side = Annotated[int, Field(ge=1, le=_MAX_SIDE)]

_INTERPOLATION = {"bilinear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC}


class PreprocessSpec(BaseModel):
    """How an image becomes a network input.

    Attributes:
        size: (height, width) of the network input in pixels.
        resize: ``squash`` (both sides, aspect ratio lost), ``crop`` (shorter side, then centre
            crop) or ``letterbox`` (longer side, then padding with ``pad_value``).
        interpolation: ``bilinear``, ``area`` (averages along an axis that shrinks, so no aliasing;
            bilinear along one that grows) or ``cubic``.
        mean, std: per channel, of pixels scaled to [0, 1]; output = (pixel / 255 - mean) / std.
            Their length is the number of channels.
        pad_value: grey level in [0, 255] around a letterboxed image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    size: tuple[Side, Side]
    resize: Literal["squash", "crop", "letterbox"] = "squash"
    interpolation: Literal["bilinear", "area", "cubic"] = "area"
    mean: Annotated[
        tuple[Annotated[FiniteFloat, Field(ge=-1e6, le=1e6)], ...],
        Field(min_length=1, max_length=16),
    ] = (0.485, 0.456, 0.406)
    std: tuple[Annotated[FiniteFloat, Field(ge=1e-6, le=1e6)], ...] = (0.229, 0.224, 0.225)
    pad_value: int = Field(default=114, ge=0, le=255)

    @model_validator(mode="after")
    def _one_std_per_mean(self) -> Self:
        if len(self.mean) != len(self.std):
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} standard deviations")
        _check_area(self.size)
        return self


class PlanesSpec(BaseModel):
    """How planes of a sensor become a network input: in their own values, at their own size.

    The graph rescales the values itself. Height and width are padded by reflection, at the bottom
    and at the right, up to what the graph can take.

    Attributes:
        size: (height, width) of a usual image in pixels; others are taken as well.
        multiple: height and width of the network input are multiples of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    size: tuple[Side, Side]
    multiple: int = Field(ge=1, le=1024)

    @model_validator(mode="after")
    def _size_within_reason(self) -> Self:
        _check_area(self.size)
        return self

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """Size of the network input for an image of (height, width)."""
        return -(-height // self.multiple) * self.multiple, -(
            -width // self.multiple
        ) * self.multiple


def _check_area(size: tuple[int, int]) -> None:
    if size[0] * size[1] > _MAX_AREA:
        raise ValueError(
            f"a network input of {size[0]} x {size[1]} has more than {_MAX_AREA} pixels"
        )


def check_image(image: Array, channels: int = 3) -> None:
    """Refuse what is not an (H, W, channels) uint8 image.

    Raises:
        InputError: another dtype, rank or channel count, or no pixels.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != channels:
        raise InputError(
            f"an image must be (H, W, {channels}) uint8, got {image.shape} {image.dtype}",
            fix="read it with runtime.images.read, or convert it",
        )
    if image.size == 0:
        raise InputError(f"an image of shape {image.shape} has no pixels")


def placement(spec: PreprocessSpec, height: int, width: int) -> Array:
    """Affine map from original to network pixel coordinates (pixel centres at integer + 0.5).

    Args:
        height, width: of the original image in pixels.

    Returns:
        (2, 3) float64 ``[[sx, 0, tx], [0, sy, ty]]``: x_network = sx * x + tx.
    """
    out_height, out_width = spec.size
    if spec.resize == "squash":
        return np.array([[out_width / width, 0, 0], [0, out_height / height, 0]])
    ratios = (out_height / height, out_width / width)
    scale = max(ratios) if spec.resize == "crop" else min(ratios)
    new_height, new_width = _scaled(height, scale), _scaled(width, scale)
    top, left = _offset(out_height - new_height), _offset(out_width - new_width)
    return np.array([[new_width / width, 0, left], [0, new_height / height, top]])


def _scaled(length: int, scale: float) -> int:
    return max(1, round(length * scale))


def _offset(space: int) -> int:
    """Half of the free (or, negative, of the surplus) pixels, rounded towards the top left."""
    return space // 2 if space >= 0 else -(-space // 2)


def place(spec: PreprocessSpec, image: Array, *, nearest: bool = False) -> Array:
    """Resize, crop or pad to the network's size; still uint8 (or whatever dtype came in).

    Args:
        image: (H, W) or (H, W, C).
        nearest: for masks and label maps: no new values appear.

    Returns:
        (height, width) or (height, width, C) with ``spec.size``.

    Raises:
        InputError: so narrow that, for its middle to be cut out, it would have to become larger
            than ``budgets.PIXELS`` allows.
    """
    height, width = image.shape[:2]
    affine = placement(spec, height, width)
    new_width, new_height = round(affine[0, 0] * width), round(affine[1, 1] * height)
    enlarged = f"an image of {height} x {width}, enlarged to {new_height} x {new_width},"
    budgets.PIXELS.check(new_height * new_width, enlarged)
    if nearest:
        image = _resize(image, new_height, new_width, cv2.INTER_NEAREST_EXACT)
    elif spec.interpolation == "area":
        # cv2's "area" repeats pixels where it grows: that part is left to bilinear
        image = _resize(image, min(height, new_height), min(width, new_width), cv2.INTER_AREA)
        image = _resize(image, new_height, new_width, cv2.INTER_LINEAR)
    else:
        image = _resize(image, new_height, new_width, _INTERPOLATION[spec.interpolation])
    if spec.resize == "squash":
        return image
    top, left = int(affine[1, 2]), int(affine[0, 2])
    out_height, out_width = spec.size
    if spec.resize == "crop":
        return np.ascontiguousarray(image[-top : -top + out_height, -left : -left + out_width])
    canvas_shape = (out_height, out_width, *image.shape[2:])
    canvas = np.full(canvas_shape, 0 if nearest else spec.pad_value, image.dtype)
    canvas[top : top + new_height, left : left + new_width] = image
    return canvas


def _resize(image: Array, height: int, width: int, interpolation: int) -> Array:
    if image.shape[:2] == (height, width):
        return image
    resized = cv2.resize(image, (width, height), interpolation=interpolation)
    return np.asarray(resized).reshape(height, width, *image.shape[2:])  # cv2 drops an axis of 1


def apply(spec: PreprocessSpec | PlanesSpec, images: Sequence[Array]) -> Array:
    """Turn images into one network batch.

    Args:
        images: (H, W, C) uint8 RGB each, of any sizes; C is ``len(spec.mean)``. For a
            ``PlanesSpec`` (H, W, 3) planes as ``runtime.planes.read`` gives them; smaller ones are
            padded to the largest.

    Returns:
        (B, C, height, width) float32, normalised as ``PreprocessSpec`` says, or raw.

    Raises:
        InputError: an image of another dtype or layout.
    """
    if isinstance(spec, PlanesSpec):
        return _pad(spec, images)
    channels = len(spec.mean)
    scale = (1.0 / (255.0 * np.asarray(spec.std))).astype(np.float32)
    shift = (-np.asarray(spec.mean) / np.asarray(spec.std)).astype(np.float32)
    batch = np.empty((len(images), channels, *spec.size), np.float32)
    for planes, image in zip(batch, images, strict=True):
        check_image(image, channels)
        for c, plane in enumerate(cv2.split(place(spec, image))):
            np.multiply(plane, scale[c], out=planes[c])
            planes[c] += shift[c]
    return batch


def _pad(spec: PlanesSpec, images: Sequence[Array]) -> Array:
    for image in images:
        check_planes(image)
    sizes = [image.shape[:2] for image in images]
    height, width = spec.padded(max(h for h, _ in sizes), max(w for _, w in sizes))
    batch = np.empty((len(images), 3, height, width), np.float32)
    for planes, image in zip(batch, images, strict=True):
        down, right = height - image.shape[0], width - image.shape[1]
        whole = cv2.copyMakeBorder(image, 0, down, 0, right, cv2.BORDER_REFLECT_101)
        for c, plane in enumerate(cv2.split(whole)):
            planes[c] = plane
    return batch


def restore(spec: PreprocessSpec, map_HW: Array, height: int, width: int) -> Array:
    """Bring a map at network size back onto the original image.

    Args:
        map_HW: (h, w) float32 at ``spec.size``.
        height, width: of the original image.

    Returns:
        (height, width) float32, bilinear; what a centre crop cut away takes the nearest edge value.
    """
    affine = placement(spec, height, width)
    if spec.resize == "squash":
        return np.asarray(cv2.resize(map_HW, (width, height), interpolation=cv2.INTER_LINEAR))
    # warpAffine counts from pixel centres at integers: shift by half a pixel on both sides
    centred = affine.copy()
    centred[:, 2] += 0.5 * np.diag(affine[:, :2]) - 0.5
    return np.asarray(
        cv2.warpAffine(
            map_HW,
            centred,
            (width, height),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
    )
