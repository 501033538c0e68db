"""Detections of a video to numbered tracks: which object is the one from the frame before?"""

from __future__ import annotations

import importlib.util
from collections.abc import Set
from dataclasses import replace

import numpy as np

from engineworks.runtime.boxes import iou
from engineworks.runtime.errors import BackendError
from engineworks.runtime.results import Detection, Detections
from engineworks.runtime.tensors import Array

_BUFFER = 0.5  # by so much of its sides a box is enlarged all around before two are compared
_MIN_OVERLAP = 0.2  # of enlarged boxes that may be one object
_PATIENCE = 15  # frames for which an object may be out of sight
_CONFIRMED = 2  # a track gets its number when it was seen once more often than this
_FIRST_SPEED = 10.0  # pixels per frame that an object may well have when it is first seen
_MEMORY = 60  # frames for which a track that ended keeps its number for who comes back
_REACH = 4.0  # of its longer sides: how far from where it was last seen
_AGILITY = 1.0  # variance by which its speed changes from frame to frame


class Tracks:
    """The tracks of one video; frames come in order.

    A Kalman filter foresees where each object will be, and a detection of its name that overlaps
    that place continues it. Boxes are enlarged before they are compared, or small objects under a
    moving camera would never overlap where they were.

    An object that was out of sight for longer than the filter foresees gets its old number back
    where nothing else of its name could be meant.

    Boxes and scores stay what was detected: a track adds its number and nothing else.

    Raises:
        BackendError: norfair-enough is not installed.

    Source of the enlarged boxes: Yang et al., "Hard to Track Objects with Irregular Motions and
    Similar Appearances? Make It Easier by Buffering the Matching Space", 2023.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("norfair") is None:
            raise BackendError(
                "tracks need the package 'norfair-enough', which is not installed",
                fix='pip install "engineworks[refdet]", or pass --no-track',
            )
        from norfair import OptimizedKalmanFilterFactory, Tracker, VectorizedDistance

        self._tracker = Tracker(
            distance_function="iou",
            distance_threshold=1 - _MIN_OVERLAP,
            hit_counter_max=_PATIENCE,
            initialization_delay=_CONFIRMED,
            filter_factory=OptimizedKalmanFilterFactory(Q=_AGILITY, vel_variance=_FIRST_SPEED**2),
            past_detections_length=0,
        )
        # the tracker's own IoU logs a warning about each prediction that has shrunk to nothing
        self._tracker.distance_function = VectorizedDistance(_distance)
        self._num_frames = 0
        self._numbers: dict[int, int] = {}  # the tracker's own number of a track -> ours
        self._seen: dict[int, tuple[Detection, int]] = {}  # ours -> where and when it was last seen

    def update(self, result: Detections) -> Detections:
        """The same detections with the numbers of their tracks, from 1, as far as they have one."""
        from norfair import Detection as Candidate

        self._num_frames += 1
        active = self._tracker.update(
            [
                Candidate(
                    np.reshape(np.array(found.box, np.float64), (2, 2)),
                    label=found.name,
                    data=(self._num_frames, i),
                )
                for i, found in enumerate(result.objects)
            ]
        )
        begun = [(track.id, track) for track in active if track.id is not None]
        going_on = {self._numbers[own] for own, _ in begun if own in self._numbers}
        numbers: dict[int, int] = {}  # place of a detection -> number of its track
        for own, track in begun:
            frame, i = track.last_detection.data
            if frame == self._num_frames:
                found = result.objects[i]
                if own not in self._numbers:
                    again = self._returned(found, going_on)
                    self._numbers[own] = again or 1 + max(self._seen, default=0)
                    going_on.add(self._numbers[own])
                numbers[i] = self._numbers[own]
                self._seen[numbers[i]] = found, frame
        objects = (replace(f, track=numbers.get(i)) for i, f in enumerate(result.objects))
        return replace(result, objects=tuple(objects))

    def _returned(self, found: Detection, going_on: Set[int]) -> int | None:
        """The number of the one track that this may be again."""
        x1, y1, x2, y2 = found.box
        lost = []
        for number, (last, frame) in self._seen.items():
            if last.name == found.name and number not in going_on:
                left, top, right, bottom = last.box
                apart = max(abs(x1 + x2 - left - right), abs(y1 + y2 - top - bottom)) / 2
                near = apart <= _REACH * max(right - left, bottom - top)
                if near and self._num_frames - frame <= _MEMORY:
                    lost.append(number)
        return lost[0] if len(lost) == 1 else None


def _distance(candidates_N4: Array, tracks_K4: Array) -> Array:
    return 1 - iou(_enlarged(candidates_N4), _enlarged(tracks_K4))


def _enlarged(boxes_N4: Array) -> Array:
    margin_N2 = _BUFFER * (boxes_N4[:, 2:] - boxes_N4[:, :2])
    return np.concatenate([boxes_N4[:, :2] - margin_N2, boxes_N4[:, 2:] + margin_N2], axis=1)
