"""The pictures of ``paco``: two views of each to learn from, one as at inference to judge by.

A view is a random crop at the network's size, perhaps flipped, with a few light changes of colour
and geometry; the second one also loses a small square and has patches exchanged. Pictures stay
uint8 until ``runtime.preprocess.apply`` normalises both views at once. Nothing edits its input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import cv2
import numpy as np
from numpy.random import Generator

from engineworks.runtime.preprocess import PreprocessSpec, apply, place
from engineworks.runtime.tensors import Array
from engineworks.training.systems.paco.config import ViewsConfig

_PATCH = 16  # side of an exchanged patch in pixels
_NUM_PAIRS = 4
# Y, I, Q of R, G, B: luminance and two axes of colour (FCC 1953, NTSC)
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


class Labelled(Protocol):
    """A picture's place in a list, with the number of its class."""

    @property
    def label(self) -> int: ...


Sample = TypeVar("Sample", bound=Labelled)


class Views(Generic[Sample]):
    """Two random views of every picture.

    A decoded picture is kept in the detail that the crops need: its shorter side is averaged down
    to the network's longer side / sqrt(smallest share of the area), so that a square crop of that
    share still has the network's size. What is not kept is shrunk all the same.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        spec: PreprocessSpec,
        config: ViewsConfig,
        *,
        read: Callable[[Sample], Array],
    ) -> None:
        """See the class.

        Args:
            read: sample -> (H, W, 3) uint8 RGB.
        """
        self.samples = samples
        self.spec = spec
        self.config = config
        self.read = read
        # a crop becomes a view by squashing, whatever evaluation does; averaging, or it aliases
        self._view = spec.model_copy(update={"resize": "squash", "interpolation": "area"})
        self._cache: dict[int, Array] = {}
        self._cache_bytes = 0

    def __len__(self) -> int:
        return len(self.samples)

    def get(self, index: int, rng: Generator) -> dict[str, Any]:
        """Both views of one picture.

        Returns:
            ``views`` (2, 3, height, width) float32 network input; ``label`` and ``index``;
            ``affine`` (2, 2, 3) float32, which takes (x, y, 1) of the original picture to (x, y)
            of each view, both in [0, 1] across the picture or view: crop, flip and rotation
            included, exchanged patches of course not.
        """
        picture = self._picture(index)
        first, affine_1 = self._draw(picture, rng)
        second, affine_2 = self._draw(picture, rng, hidden=True)
        return {
            "views": apply(self.spec, [first, second]),
            "label": self.samples[index].label,
            "index": index,
            "affine": np.stack([affine_1, affine_2]).astype(np.float32),
        }

    def _picture(self, index: int) -> Array:
        """The shrunk picture: (H, W, 3) uint8, not to be written to."""
        if index in self._cache:
            return self._cache[index]
        area = self.config.crop_area[0]
        picture = shrink(self.read(self.samples[index]), max(self.spec.size) / math.sqrt(area))
        # What does not fit is decoded every time: to drop older pictures for it would, in an
        # epoch that visits each once, leave nothing that is asked for again.
        if self._cache_bytes + picture.nbytes <= self.config.cache_bytes:
            self._cache[index] = picture
            self._cache_bytes += picture.nbytes
        return picture

    def _draw(self, picture: Array, rng: Generator, *, hidden: bool = False) -> tuple[Array, Array]:
        """One view (height, width, 3) uint8 and its (2, 3) float64 affine map.

        Args:
            hidden: occlude and shuffle it, each with its probability.
        """
        config = self.config
        height, width = picture.shape[:2]
        left, top, crop_width, crop_height = crop_box(rng, height, width, config)
        view = place(self._view, picture[top : top + crop_height, left : left + crop_width])
        affine = np.array(
            [
                [width / crop_width, 0, -left / crop_width],
                [0, height / crop_height, -top / crop_height],
                [0, 0, 1],
            ]
        )
        if rng.random() < config.flip:
            view = cv2.flip(view, 1)
            affine = np.array([[-1, 0, 1], [0, 1, 0], [0, 0, 1]]) @ affine
        for choice in rng.integers(len(OPERATIONS), size=config.operations):
            operation, reach = OPERATIONS[choice]
            strength = rng.uniform(-reach, reach)
            view = operation(view, strength)
            if operation is rotate:
                affine = _in_unit_square(rotation(strength, *view.shape[:2]), view) @ affine
        if hidden and rng.random() < config.occlusion:
            view = occlude(view, rng)
        if hidden and rng.random() < config.shuffle:
            view = shuffle(view, rng)
        return view, affine[:2]


class Pictures(Generic[Sample]):
    """Pictures as the network sees them at inference; nothing is random."""

    def __init__(
        self,
        samples: Sequence[Sample],
        spec: PreprocessSpec,
        *,
        read: Callable[[Sample], Array],
    ) -> None:
        """See ``Views``."""
        self.samples = samples
        self.spec = spec
        self.read = read

    def __len__(self) -> int:
        return len(self.samples)

    def get(self, index: int, rng: Generator) -> dict[str, Any]:
        """``images`` (3, height, width) float32, ``label`` and ``index``."""
        sample = self.samples[index]
        images_BCHW = apply(self.spec, [self.read(sample)])
        return {"images": images_BCHW[0], "label": sample.label, "index": index}


def shrink(image: Array, shorter: float) -> Array:
    """Average an image down until its shorter side is at most ``shorter`` pixels (rounded up).

    Returns:
        The image itself where it is small enough.
    """
    height, width = image.shape[:2]
    scale = math.ceil(shorter) / min(height, width)
    if scale >= 1:
        return image
    size = (round(width * scale), round(height * scale))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA))


def crop_box(
    rng: Generator, height: int, width: int, config: ViewsConfig
) -> tuple[int, int, int, int]:
    """A random crop of a picture of that size.

    Its share of the area is uniform in ``crop_area``; its width over its height is log-uniform
    over those of ``crop_ratio`` that fit into the picture at that area. In a picture so long that
    none fits, it is the largest crop of the nearest ratio.

    Returns:
        left, top, width, height in pixels.
    """
    area = height * width * rng.uniform(*config.crop_area)
    low, high = np.clip((area / height**2, width**2 / area), *config.crop_ratio)
    ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
    ideal = np.array([math.sqrt(area * ratio), math.sqrt(area / ratio)])
    ideal *= min(1, width / ideal[0], height / ideal[1])
    crop_width, crop_height = (max(1, round(side)) for side in ideal.tolist())
    left = int(rng.integers(width - crop_width + 1))
    top = int(rng.integers(height - crop_height + 1))
    return left, top, crop_width, crop_height


def rotation(degrees: float, height: int, width: int) -> Array:
    """A turn counter-clockwise about the middle of an image.

    Returns:
        (3, 3) float64, of (x, y, 1) in pixels whose centres lie at integer + 0.5.
    """
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return np.array(
        [[cos, sin, x - cos * x - sin * y], [-sin, cos, y + sin * x - cos * y], [0, 0, 1]]
    )


def rotate(image: Array, degrees: float) -> Array:
    """Turn by -15 to 15 degrees counter-clockwise; the corners are filled by reflection."""
    height, width = image.shape[:2]
    affine = rotation(degrees, height, width)[:2]
    affine[:, 2] += affine[:, :2].sum(axis=1) / 2 - 0.5  # OpenCV's centres lie at integers
    turned = cv2.warpAffine(
        image, affine, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
    )
    return np.asarray(turned)


def brightness(image: Array, strength: float) -> Array:
    """Scale all values by 1 + strength, -0.25 to 0.25."""
    return _line(image, 1 + strength, 0)


def contrast(image: Array, strength: float) -> Array:
    """Scale the distance from the mean luminance by 1 + strength, -0.25 to 0.25."""
    mean = float(np.dot(_YIQ[0], cv2.mean(image)[:3]))
    return _line(image, 1 + strength, -strength * mean)


def saturation(image: Array, strength: float) -> Array:
    """Scale the distance of each pixel from its grey by 1 + strength, -0.25 to 0.25."""
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return np.asarray(cv2.addWeighted(image, 1 + strength, grey, -strength, 0))


def hue(image: Array, turn: float) -> Array:
    """Turn the circle of colours by -0.1 to 0.1 of a whole turn; luminance stays.

    A rotation in the colour plane of YIQ: one matrix, where HSV would round twice.
    """
    angle = 2 * math.pi * turn
    cos, sin = math.cos(angle), math.sin(angle)
    mixed = np.linalg.solve(_YIQ, np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ _YIQ)
    return np.asarray(cv2.transform(image, mixed))


def sharpness(image: Array, strength: float) -> Array:
    """Scale the distance from a smoothed image by 1 + strength, -0.5 to 0.5."""
    smooth = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    kernel = -strength * smooth
    kernel[1, 1] += 1 + strength
    return np.asarray(cv2.filter2D(image, -1, kernel))


# each with the largest strength, in both directions, that is drawn; 0 changes nothing
OPERATIONS: tuple[tuple[Callable[[Array, float], Array], float], ...] = (
    (rotate, 15.0),
    (brightness, 0.25),
    (contrast, 0.25),
    (saturation, 0.25),
    (hue, 0.1),
    (sharpness, 0.5),
)


def occlude(image: Array, rng: Generator) -> Array:
    """A copy in which one square, a quarter of the shorter side wide, is the image's mean colour.

    Published as a tenth of the area but no wider than a quarter of the side: the second always
    binds, which makes it a sixteenth of a square image.
    """
    height, width = image.shape[:2]
    side = math.ceil(min(height, width) / 4)
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    covered = image.copy()
    covered[top : top + side, left : left + side] = np.rint(cv2.mean(image)[:3])
    return covered


def shuffle(image: Array, rng: Generator) -> Array:
    """A copy in which 4 pairs of 16 x 16 patches of a grid, all different, changed places.

    A small image has fewer patches, and so fewer pairs.
    """
    rows, columns = image.shape[0] // _PATCH, image.shape[1] // _PATCH
    num_pairs = min(_NUM_PAIRS, rows * columns // 2)
    chosen = rng.permutation(rows * columns)[: 2 * num_pairs].tolist()
    mixed = image.copy()
    patches = [
        (slice(row * _PATCH, (row + 1) * _PATCH), slice(column * _PATCH, (column + 1) * _PATCH))
        for row, column in (divmod(patch, columns) for patch in chosen)
    ]
    for here, there in zip(patches[::2], patches[1::2], strict=True):
        mixed[here], mixed[there] = image[there], image[here]
    return mixed


def _line(image: Array, slope: float, offset: float) -> Array:
    """``slope * value + offset`` of every value, rounded and clipped to 0 ... 255."""
    table = np.clip(np.rint(slope * np.arange(256) + offset), 0, 255).astype(np.uint8)
    return np.asarray(cv2.LUT(image, table))


def _in_unit_square(pixels_33: Array, view: Array) -> Array:
    """The same map of a view's pixels, in coordinates from 0 to 1 across it."""
    scale = np.array([view.shape[1], view.shape[0], 1])
    return np.asarray(pixels_33 * scale / scale[:, None])
