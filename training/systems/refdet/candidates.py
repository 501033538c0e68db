"""What ``relation`` learns from: candidates of matching, computed once from frozen maps.

    frames, and frames with pasted objects -> maps -> for each of a few objects the best candidates

An object's template is the mean of references that are drawn anew for every frame. Frames are also
searched for objects that are not in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from engineworks.runtime import boxes
from engineworks.runtime.frames import Frames
from engineworks.runtime.objects import ObjectData
from engineworks.runtime.preprocess import PreprocessSpec, apply
from engineworks.runtime.references import mean_template
from engineworks.runtime.tensors import Array
from engineworks.training.data import WHOLE
from engineworks.training.ranks import Part
from engineworks.training.systems.refdet.config import RelationConfig
from engineworks.training.systems.refdet.match import DetectMatch, Maps
from engineworks.training.systems.refdet.relation import moves
from engineworks.training.systems.refdet.synthesis import Scene, Synthesis
from engineworks.training.task import Progress

_BATCH = 8  # frames at once


@dataclass(frozen=True, eq=False)
class Candidates:
    """Of all frames and objects, one after the other.

    Attributes:
        windows: (A, K, c, c) float16, see ``Relation``.
        facts: (A, 8) float32.
        overlaps: (A,) float32 IoU with the nearest box of the object.
        moves: (A, 4) float32 that bring the candidate to that box.
    """

    windows: Tensor
    facts: Tensor
    overlaps: Tensor
    moves: Tensor

    def __len__(self) -> int:
        return len(self.facts)


class Batches:
    """Candidates for ``training.data.loader``, which must take each as a whole batch."""

    def __init__(self, candidates: Candidates, batch_size: int, part: Part = WHOLE) -> None:
        self.part = part
        self.candidates = candidates
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.candidates) // self.batch_size)

    def get(self, index: int, rng: Generator) -> dict[str, Tensor]:
        """A batch, drawn anew; this rank's part of it."""
        chosen = torch.from_numpy(rng.integers(len(self.candidates), size=self.batch_size))
        chosen = chosen[self.part.of(self.batch_size, "candidates")]
        found = self.candidates
        return {
            "windows": found.windows[chosen].float(),
            "facts": found.facts[chosen],
            "overlaps": found.overlaps[chosen],
            "moves": found.moves[chosen],
        }


@torch.no_grad()
def collect(
    detect: DetectMatch,
    data: ObjectData,
    rows: Mapping[str, Array],
    frames: Frames,
    spec: PreprocessSpec,
    config: RelationConfig,
    *,
    shots: int,
    seed: int,
    progress: Progress,
) -> Candidates:
    """Candidates in all frames of ``data``, and in ``config.synthesis`` times as many made ones.

    Args:
        rows: object -> (R, P), its references as ``Matcher.encode`` gives them.
        shots: references of a template.
    """
    rng = np.random.default_rng(seed)
    synthesis = Synthesis(data.frames, frames)
    num, num_made = len(data.frames), round(config.synthesis * len(data.frames))
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for start in range(0, num + num_made, _BATCH):
        scenes = [
            Scene(
                frames.read(data.frames[i].frame), data.frames[i].boxes_N4, data.frames[i].objects
            )
            if i < num
            else synthesis.scene(rng)
            for i in range(start, min(start + _BATCH, num + num_made))
        ]
        pixels = torch.from_numpy(apply(spec, [scene.image for scene in scenes]))
        maps, seen = detect.matcher.maps(pixels), detect.matcher.seen(pixels)
        for i, scene in enumerate(scenes):
            for name in _searched(scene, sorted(rows), config.absent, rng):
                row = mean_template(rng.permutation(rows[name])[:shots])
                truth_M4 = _truth(scene, name, spec)
                found.append(_of_object(detect, maps.of(i), seen[i : i + 1], row, truth_M4, config))
        progress("candidates", start + len(scenes), num + num_made)
    return Candidates(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _searched(scene: Scene, names: Sequence[str], num_absent: int, rng: Generator) -> list[str]:
    present = sorted(set(scene.objects).intersection(names))
    absent = [name for name in names if name not in present]
    return [*present, *rng.permutation(absent)[:num_absent].tolist()]


def _truth(scene: Scene, name: str, spec: PreprocessSpec) -> Array:
    its = [each == name for each in scene.objects]
    return boxes.to_network(scene.boxes_N4[its], spec, *scene.image.shape[:2])


def _of_object(
    detect: DetectMatch,
    maps: Maps,
    seen_1HW: Tensor,
    row_P: Array,
    truth_M4: Array,
    config: RelationConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best candidates of one object in one frame."""
    row_1P = torch.from_numpy(row_P)[None]
    found = detect.matcher.found(maps, seen_1HW, row_1P)
    num = config.candidates if len(truth_M4) else max(1, config.candidates // 2)
    places_1M, is_peak_1M = detect.peaks(found, num)
    places_1M = places_1M[:, is_peak_1M[0] > 0]
    all_14A = detect.boxes(found.logits, row_1P)
    boxes_1M4 = all_14A.gather(2, places_1M[:, None].expand(-1, 4, -1)).transpose(1, 2)
    windows, facts = detect.candidates(found, places_1M, boxes_1M4, row_1P)
    overlaps, wanted = torch.zeros(len(facts)), boxes_1M4[0]
    if len(truth_M4):
        overlap_KM = boxes.iou(boxes_1M4[0].numpy(), truth_M4)
        overlaps = torch.from_numpy(overlap_KM.max(1))
        wanted = torch.from_numpy(truth_M4[overlap_KM.argmax(1)])
    return windows.half(), facts, overlaps, moves(boxes_1M4[0], wanted)
