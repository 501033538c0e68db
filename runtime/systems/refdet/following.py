"""Objects of a video, followed: between two full searches each is looked for around its last place.

The graph ``follow`` is the net of ``detect`` on a small picture, with boxes of a few sizes about
that of the object. An object whose score falls below ``conf`` is lost: that frame is searched
whole, and so are the next ones until something is found. Templates stay those of the references:
what was found is never learned, so nothing drifts away from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from engineworks.runtime import boxes
from engineworks.runtime.preprocess import apply
from engineworks.runtime.references import View, centred
from engineworks.runtime.results import Detection, Detections
from engineworks.runtime.systems.refdet.detecting import (
    FollowParams,
    InferenceConfig,
    Run,
    candidates,
    select,
)
from engineworks.runtime.tensors import Array


class Follower:
    """The objects of one video; frames come in order.

    Args:
        search: a frame -> what is found in all of it.
        run: the graph ``follow``.
        names, rows_NP: what is looked for, and its prototypes.
        unwanted: places in ``names`` of what is never found.
        params, config: see there.

    Attributes:
        num_searched, num_followed: frames that were searched whole, and those that were not.
    """

    def __init__(
        self,
        search: Callable[[Array], Detections],
        run: Run,
        names: Sequence[str],
        rows_NP: Array,
        unwanted: Sequence[int],
        params: FollowParams,
        config: InferenceConfig,
    ) -> None:
        self._search = search
        self._run = run
        self._rows = dict(zip(names, rows_NP, strict=True))
        self._unwanted_KP = rows_NP[list(unwanted)]
        self._params = params
        self._config = config
        self._known: list[tuple[Detection, Array]] = []  # and their boxes, not clipped to the frame
        self._since = 0  # frames since the last full search
        self.num_searched = self.num_followed = 0

    def infer(self, images: Sequence[Array]) -> list[Detections]:
        """As ``System.infer``, for the next frames of the video.

        Raises:
            InputError, NotFiniteError: as there.
        """
        return [self._next(image) for image in images]

    def _next(self, image: Array) -> Detections:
        found = None
        if 0 < len(self._known) <= self._params.most and self._since < self._params.every - 1:
            found = self._followed(image)
        if found is None:
            self.num_searched += 1
            self._since = 0
            found = [(each, np.array(each.box)) for each in self._search(image).objects]
        else:
            self.num_followed += 1
            self._since += 1
        self._known = found
        return Detections(tuple(each for each, _ in found))

    def _followed(self, image: Array) -> list[tuple[Detection, Array]] | None:
        """All known objects where they are now; None where one of them is lost."""
        found: list[tuple[Detection, Array]] = []
        for last, box_4 in self._known:
            now = self._local(image, last.name, box_4)
            if now is None:
                return None
            rivals = [box for each, box in found if each.name == last.name]
            if rivals and (boxes.iou(now[1][None], np.stack(rivals)) > self._config.iou).any():
                return None  # two became one: the other is lost
            found.append(now)
        return sorted(found, key=lambda each: -each[0].score)

    def _local(self, image: Array, name: str, last_4: Array) -> tuple[Detection, Array] | None:
        """An object around its last place, if it is there."""
        params = self._params
        x1, y1, x2, y2 = last_4.tolist()
        view = centred(params.preprocess, params.share, View(image, (x1, y1, x2, y2)))
        placed_4 = np.array(view.box)
        prototypes_NP = np.concatenate([self._rows[name][None], self._unwanted_KP])
        found = candidates(
            self._run, apply(params.preprocess, [view.image]), prototypes_NP, "follow"
        )
        boxes_M4, scores_M, classes_M = (each[0] for each in found)
        unwanted = range(1, len(prototypes_NP))
        boxes_K4, scores_K, _ = select(boxes_M4, scores_M, classes_M, self._config, unwanted)
        if not len(boxes_K4):
            return None
        best = int(np.argmax(self._preference(boxes_K4, scores_K, placed_4)))
        box_4 = self._steadied(boxes_K4[best], placed_4)
        # from the picture that was searched back to the image
        zoom = (x2 - x1) / (placed_4[2] - placed_4[0])
        box_4 = np.tile(last_4[:2], 2) + zoom * (box_4 - np.tile(placed_4[:2], 2))
        inside_4 = boxes.clip(box_4[None], *image.shape[:2])[0]
        if not boxes.areas(inside_4[None])[0] > 0:
            return None
        x1, y1, x2, y2 = inside_4.tolist()
        return Detection(name, float(scores_K[best]), (x1, y1, x2, y2)), box_4

    def _preference(self, boxes_K4: Array, scores_K: Array, before_4: Array) -> Array:
        """(K,) logits, less what candidates lose that are far from where it was."""
        side = (before_4[2:] - before_4[:2]).max()
        apart = np.linalg.norm(_centre(boxes_K4) - _centre(before_4[None]), axis=1) / side
        grown = np.log2((boxes_K4[:, 2:] - boxes_K4[:, :2]).max(axis=1) / side)
        sure = np.clip(scores_K, 1e-6, 1 - 1e-6)
        lost = self._params.nearness * apart**2 + self._params.steadiness * grown**2
        return np.asarray(np.log(sure / (1 - sure)) - lost)

    def _steadied(self, box_4: Array, before_4: Array) -> Array:
        """The box with a size between its own and the one before."""
        now_2, before_2 = box_4[2:] - box_4[:2], before_4[2:] - before_4[:2]
        sides_2 = before_2 * (now_2 / before_2) ** self._params.agility
        middle_2 = (box_4[:2] + box_4[2:]) / 2
        return np.concatenate([middle_2 - sides_2 / 2, middle_2 + sides_2 / 2])


def _centre(boxes_K4: Array) -> Array:
    return np.asarray((boxes_K4[:, :2] + boxes_K4[:, 2:]) / 2)
