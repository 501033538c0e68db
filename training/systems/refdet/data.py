"""Episodes of ``refdet``: frames, what they are searched for, and pictures of it.

An episode is a batch, and a function of (seed, epoch, index) alone. All changes of a frame's
geometry happen at the network's size, on uint8; ``runtime.preprocess.apply`` normalises, here as
at inference. Nothing edits its input.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator

from engineworks.runtime import boxes
from engineworks.runtime.frames import Frames
from engineworks.runtime.objects import LabelledFrame, ObjectData
from engineworks.runtime.preprocess import PreprocessSpec, apply, place
from engineworks.runtime.tensors import Array
from engineworks.training.data import WHOLE
from engineworks.training.ranks import Part
from engineworks.training.systems.refdet.config import AugmentConfig, TaskConfig

_FEWEST, _MOST = 10, 1000  # episodes of an epoch, where their number is computed
_MIN_AREA = 2.0  # square pixels of a box that is still there
_MIN_VISIBLE = 0.1  # share of its area
_MIXING = 0.15  # standard deviation of how channels are mixed
_INVERTED = 0.25  # probability of a channel


def num_episodes(num_frames: int, batch_size: int, coverage: float) -> int:
    """Episodes of an epoch that show every frame ``coverage`` times, from 10 to 1000."""
    return min(max(int(math.ceil(num_frames / batch_size) * coverage), _FEWEST), _MOST)


class Episodes:
    """Episodes for ``training.data.loader``, which must take each as a whole batch."""

    def __init__(self, data: ObjectData, config: TaskConfig, part: Part = WHOLE) -> None:
        """Take a part of each episode: of its frames, and of its pictures.

        Every rank draws the whole of it, because one thing follows from the other.
        """
        self.part = part
        self.data = data
        self.config = config
        self.names = sorted(data.references)
        self.frames = Frames(config.episodes.cache_bytes)
        self._where: dict[str, list[int]] = {name: [] for name in self.names}
        for i, frame in enumerate(data.frames):
            for name in set(frame.objects):
                self._where[name].append(i)
        self._shown = [name for name in self.names if self._where[name]]

    def __len__(self) -> int:
        episodes = self.config.episodes
        batch_size = self.config.train.batch_size
        return episodes.num or num_episodes(len(self.data.frames), batch_size, episodes.coverage)

    def get(self, index: int, rng: Generator) -> dict[str, Any]:
        """One episode of B frames, N objects and R = N K references; arrays, lists and texts.

        Returns:
            ``images`` (B, 3, H, W) and ``pictures`` (R, 3, S, S) float32 network input;
            ``object_of_picture`` (R,) int64, of the pictures of all ranks; ``prompted`` (B, N)
            bool: what each frame is searched for; per frame, in lists: ``boxes`` (M, 4) float32
            xyxy in pixels of the network's input, ``objects`` (M,) int64 in [0, N), -1: none of the
            N, and ``base`` (M,) int64 class, -1: none.
        """
        config, augment = self.config, self.config.augment
        chosen, names = self._choose(rng)
        recolour = int(rng.integers(augment.recolours)) if rng.random() < augment.recolour else None
        matrix = (
            None
            if recolour is None
            else recolouring(config.train.seed, recolour, grey=augment.grey)
        )

        pixels, found = [], []
        for frame in chosen:
            whole = self.frames.read(frame.frame)
            known = boxes.to_network(frame.boxes_N4, config.preprocess, *whole.shape[:2])
            image = place(config.preprocess, whole)
            image, known, kept = change(image, known, config.preprocess, augment, rng)
            pixels.append(image if matrix is None else cv2.transform(image, matrix))
            found.append((known, [frame.objects[i] for i in np.flatnonzero(kept)]))
        pictures = []
        for name in names:
            references = self.data.references[name]
            order = rng.permutation(len(references))
            for k in range(config.episodes.shots):
                number, variant = int(order[k % len(order)]), int(rng.integers(augment.variants))
                picture = self._reference(name, number, variant)
                pictures.append(picture if matrix is None else cv2.transform(picture, matrix))

        column = {name: i for i, name in enumerate(names)}
        base = {name: i if config.base else -1 for i, name in enumerate(self.names)}
        objects = [_numbers(column.get(name, -1) for name in seen) for _, seen in found]
        prompted = [self._prompt(each, len(names), rng) for each in objects]
        own, shown = self.part.of(len(pixels), "frames"), self.part.of(len(pictures), "references")
        return {
            "images": apply(config.preprocess, pixels[own]),
            "pictures": apply(config.reference_preprocess, pictures[shown]),
            "object_of_picture": np.repeat(np.arange(len(names)), config.episodes.shots),
            "prompted": np.stack(prompted[own]),
            "boxes": [known for known, _ in found[own]],
            "objects": objects[own],
            "base": [_numbers(base[name] for name in seen) for _, seen in found[own]],
        }

    def _choose(self, rng: Generator) -> tuple[list[LabelledFrame], list[str]]:
        """The frames, and the objects that they may be searched for."""
        episodes, num = self.config.episodes, self.config.train.batch_size
        drawn = [str(name) for name in rng.permutation(self._shown)[: episodes.ways or num]]
        frames = []
        for i in range(num):
            places = self._where[drawn[i % len(drawn)]]
            frames.append(self.data.frames[places[int(rng.integers(len(places)))]])
        seen = {name for frame in frames for name in frame.objects}
        others = [str(name) for name in rng.permutation(self.names)]
        order = [*drawn, *(n for n in others if n in seen), *(n for n in others if n not in seen)]
        names = list(dict.fromkeys(order))[: episodes.objects]
        return frames, [names[i] for i in rng.permutation(len(names))]

    def _prompt(self, objects_M: Array, num: int, rng: Generator) -> Array:
        """(N,) bool: what a frame with these objects is searched for, at least one."""
        episodes = self.config.episodes
        prompted = rng.random(num) < rng.uniform(*episodes.prompted)
        known = objects_M[objects_M >= 0]
        if len(known) and rng.random() < episodes.positive:
            prompted[rng.choice(known)] = True
        if not prompted.any():
            prompted[rng.integers(num)] = True
        return prompted

    def _reference(self, name: str, number: int, variant: int) -> Array:
        """(S, S, 3) uint8: one of the variants of a reference, always the same."""
        augment = self.config.augment
        place_of_name = self.names.index(name)
        rng = np.random.default_rng((self.config.train.seed, place_of_name, number, variant))
        picture = self.frames.reference(self.data.references[name][number])
        height, width = picture.shape[:2]
        share = rng.uniform(augment.reference_crop, 1)
        rows, columns = max(1, round(share * height)), max(1, round(share * width))
        top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
        picture = picture[top : top + rows, left : left + columns]
        picture = place(self.config.reference_preprocess, picture)
        if augment.reference_turn:
            picture = np.rot90(picture, int(rng.integers(4)))
        if rng.random() < 0.5:
            picture = picture[:, ::-1]
        return shaded(np.ascontiguousarray(picture), augment, rng)


def _numbers(values: Iterable[int]) -> Array:
    return np.fromiter(values, np.int64)


# --- changes -------------------------------------------------------------------------------------


def recolouring(seed: int, number: int, *, grey: float = 0.0) -> Array:
    """(3, 4) float64 for ``cv2.transform``: channels exchanged, some inverted, a little mixed.

    Args:
        grey: share of the numbers that leave no colour, but a mixture of the channels.
    """
    rng = np.random.default_rng((seed, number))
    exchanged = np.eye(3)[rng.permutation(3)]
    signs = np.where(rng.random(3) < _INVERTED, -1.0, 1.0)
    matrix = exchanged * signs + rng.normal(0, _MIXING, (3, 3))
    if rng.random() < grey:
        matrix = np.tile(rng.dirichlet(np.ones(3)), (3, 1))
    middle = np.full(3, 127.5)  # stays where it is
    return np.column_stack([matrix, middle - matrix @ middle])


def change(
    image: Array, boxes_N4: Array, spec: PreprocessSpec, config: AugmentConfig, rng: Generator
) -> tuple[Array, Array, Array]:
    """Another view of a frame at the network's size.

    Args:
        image: (H, W, 3) uint8.
        boxes_N4: in its pixels.
        spec: says what is shown beside the frame.

    Returns:
        (H, W, 3) uint8; (K, 4) float32 boxes in it; (N,) bool: of which boxes these are. Of the
        others less than a tenth, or less than two square pixels, can be seen.
    """
    height, width = image.shape[:2]
    if rng.random() < config.turn:
        image, boxes_N4 = turned(
            image, boxes_N4, quarters=int(rng.integers(4)), mirrored=rng.random() < 0.5
        )
        if image.shape[:2] != (height, width):  # an oblong frame that lies on its side
            image, boxes_N4 = fitted(image, boxes_N4, height, width, spec)
    if rng.random() < config.affine:
        matrix = cv2.getRotationMatrix2D(
            (width / 2, height / 2),
            rng.uniform(-config.degrees, config.degrees),
            rng.uniform(*config.scale),
        )
        image, boxes_N4 = warped(image, boxes_N4, matrix, (height, width), spec)
    clipped = boxes.clip(boxes_N4, height, width)
    area, whole = boxes.areas(clipped), boxes.areas(boxes_N4)
    kept = (area >= _MIN_AREA) & (area >= _MIN_VISIBLE * whole)
    image = shaded(image, config, rng)
    if rng.random() < config.blur:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.2))
    if rng.random() < config.noise:
        grain = rng.uniform(2, 10) * rng.standard_normal(image.shape, np.float32)
        image = cv2.add(image, grain, dtype=cv2.CV_8U)
    if rng.random() < config.erase:
        image = erased(image, rng, spec.pad_value)
    return image, clipped[kept], kept


def turned(image: Array, boxes_N4: Array, *, quarters: int, mirrored: bool) -> tuple[Array, Array]:
    """Turned counterclockwise by quarters of a circle, then perhaps mirrored left to right."""
    for _ in range(quarters):
        width = image.shape[1]
        image = cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE)
        x1, y1, x2, y2 = boxes_N4.T
        boxes_N4 = np.stack([y1, width - x2, y2, width - x1], axis=1)
    if mirrored:
        width = image.shape[1]
        image = cv2.flip(image, 1)
        x1, y1, x2, y2 = boxes_N4.T
        boxes_N4 = np.stack([width - x2, y1, width - x1, y2], axis=1)
    return image, boxes_N4


def fitted(
    image: Array, boxes_N4: Array, height: int, width: int, spec: PreprocessSpec
) -> tuple[Array, Array]:
    """The whole image in the middle of another size."""
    scale = min(height / image.shape[0], width / image.shape[1])
    left, top = (width - scale * image.shape[1]) / 2, (height - scale * image.shape[0]) / 2
    matrix = np.array([[scale, 0, left], [0, scale, top]])
    return warped(image, boxes_N4, matrix, (height, width), spec)


def warped(
    image: Array,
    boxes_N4: Array,
    matrix_23: Array,
    size: tuple[int, int],
    spec: PreprocessSpec,
) -> tuple[Array, Array]:
    """Image and boxes under an affine map of (x, y), pixel centres at integers + 0.5.

    Returns:
        The image, (height, width, 3), and the upright boxes around what the boxes became; neither
        clipped nor dropped.
    """
    shift = matrix_23[:, :2] @ [0.5, 0.5] + matrix_23[:, 2] - 0.5
    pixels = cv2.warpAffine(  # its pixel centres are at integers
        image,
        np.column_stack([matrix_23[:, :2], shift]),
        (size[1], size[0]),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(spec.pad_value,) * 3,
    )
    corners_N42 = boxes_N4[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]
    moved_N42 = corners_N42 @ matrix_23[:, :2].T + matrix_23[:, 2]
    around = np.concatenate([moved_N42.min(axis=1), moved_N42.max(axis=1)], axis=1)
    return pixels, around.astype(np.float32)


def shaded(image: Array, config: AugmentConfig, rng: Generator) -> Array:
    """Another brightness, contrast, tint, hue and saturation; (H, W, 3) uint8."""
    gain = 1 + rng.uniform(-config.light, config.light) + rng.uniform(-1, 1, 3) * config.colour
    shift = rng.uniform(-config.light, config.light) * 127.5
    offset = 127.5 * (1 - gain) + shift
    hue = math.radians(rng.uniform(-config.hue, config.hue))
    saturation = 1 + rng.uniform(-config.saturation, config.saturation)
    matrix = np.column_stack([gain[:, None] * chroma(hue, saturation), offset])
    return np.asarray(cv2.transform(image, matrix))


def chroma(hue: float, saturation: float) -> Array:
    """(3, 3) for colours: turned about the axis of the greys, which stay, and moved away from it.

    Args:
        hue: angle in radians; 2 pi / 3 turns red to green, and green to blue.
        saturation: factor of the distance from the axis; 0: grey.
    """
    greys = np.full((3, 3), 1 / 3)  # the projection onto the axis
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    moved = math.cos(hue) * (np.eye(3) - greys) + math.sin(hue) * across
    return np.asarray(greys + saturation * moved)


def erased(image: Array, rng: Generator, value: int) -> Array:
    """Without one rectangle, up to a fifth of the sides."""
    height, width = image.shape[:2]
    rows, columns = (max(1, int(side * rng.uniform(0.05, 0.2))) for side in (height, width))
    top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
    image = image.copy()
    image[top : top + rows, left : left + columns] = value
    return image
