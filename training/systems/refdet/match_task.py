"""How ``refdet`` is made ready to match: a frozen net, and references; nothing need be learned."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor, nn
from torch.utils.data import DataLoader

from engineworks.runtime import boxes, files, references
from engineworks.runtime.evaluation import Evaluation
from engineworks.runtime.evidence import BoxRanking
from engineworks.runtime.objects import LabelledFrame, ObjectData, object_splits, read_objects
from engineworks.runtime.preprocess import apply
from engineworks.runtime.tensors import Array
from engineworks.training import ranks
from engineworks.training.data import loader
from engineworks.training.run import Run, judged
from engineworks.training.systems.refdet import confidence, task
from engineworks.training.systems.refdet.config import TaskConfig
from engineworks.training.systems.refdet.data import Episodes
from engineworks.training.systems.refdet.match import AT_ONCE, DetectMatch, Matcher
from engineworks.training.task import Position, Progress

_CALIBRATED, _CALIBRATION_FRAMES = 16, 100  # objects and frames that scores are fitted on, at most


def build_matcher(config: TaskConfig, *, weights: bool = True) -> Matcher:
    """The net of a configuration that matches.

    Args:
        weights: False leaves random numbers, for a checkpoint to replace.

    Raises:
        ConfigError, WeightsError: from ``training.backbones``.
    """
    assert config.match is not None
    return Matcher(
        config.encoder,
        config.match,
        preprocess=config.preprocess,
        object_size=config.match.object_share * min(config.reference_preprocess.size),
        seed=config.train.seed,
        weights=weights,
    )


def spread(frames: Sequence[LabelledFrame], num: int) -> Sequence[LabelledFrame]:
    """So many of them, evenly spread; all where they are fewer."""
    num = min(num, len(frames))
    return [frames[i * len(frames) // num] for i in range(num)]


def _places_in(boxes_N4: Array, grid: Sequence[int], stride: int) -> Array:
    """(h, w) bool: which places of a map have their centre in one of the boxes."""
    y, x = (stride * (np.arange(num) + 0.5) for num in grid)
    low, high = boxes_N4[:, :2, None], boxes_N4[:, 2:, None]
    across_NW = (low[:, 0] <= x) & (x < high[:, 0])
    down_NH = (low[:, 1] <= y) & (y < high[:, 1])
    return np.asarray((down_NH[:, :, None] & across_NW[:, None]).any(0))


class Task(task.Task):
    """See ``training.task.Task``; data, judging and what a run holds are those of the detector."""

    written = (*task.Task.written, "confidence.json")
    at_once = AT_ONCE

    def read_training(self, data: Path) -> ObjectData:
        """Nothing is learned, so any split will do: a folder may well have none for training."""
        self._data = data
        return read_objects(data, self.judged_by or "train")

    def set_up(self, weights: bool) -> None:
        self.matcher = build_matcher(self.config, weights=weights)
        self.matcher.requires_grad_(False)
        if weights and self.matcher.ground_K is not None:
            (ground_K,) = ranks.from_main(lambda: [self._ground()])
            self.matcher.ground_K.copy_(ground_K)
        self.model = self.matcher
        self.best = ()  # no epoch is better than another
        self.provenance: dict[str, JsonValue] = {**self.matcher.provenance}

    @torch.no_grad()
    def _ground(self) -> Tensor:
        """(K,): see ``KindConfig``; 0 where there are no frames for training."""
        matcher, spec = self.matcher.eval(), self.config.preprocess
        assert matcher.config.kind is not None and matcher.ground_K is not None
        total_K, num = torch.zeros_like(matcher.ground_K), 0
        for each in spread(self.frames_to_train_on(), matcher.config.kind.ground):
            image = self._frames.read(each.frame)
            (said_HWK,) = matcher.said_of_places(torch.from_numpy(apply(spec, [image])))
            height, width = image.shape[:2]
            found_N4 = boxes.to_network(each.boxes_N4, spec, height, width)
            whole = np.array([[0, 0, width, height]], np.float32)
            covered, inside = (
                _places_in(some, said_HWK.shape[:2], matcher.deep_stride)
                for some in (found_N4, boxes.to_network(whole, spec, height, width))
            )
            ground_LK = said_HWK[torch.from_numpy(inside & ~covered)]
            total_K += ground_LK.sum(0)
            num += len(ground_LK)
        return total_K / max(1, num)

    def frames_to_train_on(self) -> Sequence[LabelledFrame]:
        """With their boxes; none where the data are there to judge by alone."""
        data = self.training if self.judged_by is None else self.unlearned()
        return () if data is None else data.frames

    def loader(self) -> DataLoader[Any]:
        episodes = Episodes(self.training, self.config)
        return loader(episodes, self.config.train, shuffle=False, batched=True)

    def step(self, model: nn.Module, batch: Any, position: Position) -> Mapping[str, Tensor]:
        return {"loss": torch.zeros(())}  # nothing is learned

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {}  # nothing changes from epoch to epoch

    def _parts(self) -> dict[str, nn.Module]:
        return {}

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        return []

    def learned(self) -> list[str]:
        return []

    def unlearned(self) -> ObjectData | None:
        """Frames and objects that nothing was learned of and that do not judge: ``conf`` is fitted
        on them. None: there are none.
        """
        if self.judged_by is None or "train" not in object_splits(self._data):
            return None
        return read_objects(self._data, "train", hold_out=self.config.hold_out)

    def finish(self, run: Run, model: nn.Module, progress: Progress) -> dict[str, JsonValue]:
        """Write what the bundle looks for unless told otherwise, and judge."""
        files.write(run.root / "labels.json", "[]\n")
        files.write(run.root / "learned.json", json.dumps(self.learned(), indent=2) + "\n")
        self._save_references(run)
        matcher = self._calibrated(run, progress)
        results: dict[str, JsonValue] = {
            "parameters": {
                "net": sum(p.numel() for p in self.matcher.net.parameters()),
                "score": sum(p.numel() for p in self.matcher.score.parameters()),
                "relation": sum(p.numel() for p in self._relation()),
            }
        }
        if self.judged is not None:
            results |= judged(str(self.judged_by), self._judged(matcher, self.judged, progress))
        return results

    def _relation(self) -> list[nn.Parameter]:
        relation = self.matcher.relation
        return [] if relation is None else list(relation.parameters())

    def _calibrated(self, run: Run, progress: Progress) -> Matcher:
        """What judges, with scores that are shares of right boxes where data tell them."""
        path = run.root / "confidence.json"
        path.unlink(missing_ok=True)
        matcher = copy.deepcopy(self.matcher)
        if (data := self.unlearned()) is None:
            return matcher
        names = sorted(data.references)[:_CALIBRATED]
        shown = [each for each in data.frames if set(each.objects).intersection(names)]
        chosen = shown[:: -(-len(shown) // _CALIBRATION_FRAMES) or 1]
        some = ObjectData(tuple(chosen), {name: data.references[name] for name in names})
        (ranking,) = self._judged(matcher, some, progress, whole=True).evidence
        assert isinstance(ranking, BoxRanking)
        scores_D = np.concatenate([found.scores_D for found in ranking.classes])
        right_D = np.concatenate([found.right_TD[0] for found in ranking.classes])
        if (found := confidence.fitted(scores_D, right_D)) is not None:
            factors = {"scale": found[0], "shift": found[1]}
            matcher.calibrate(**factors)
            files.write(path, json.dumps(factors) + "\n")
        return matcher

    def _judged(
        self, matcher: Matcher, data: ObjectData, progress: Progress, *, whole: bool = False
    ) -> Evaluation:
        """As ``runtime.systems.refdet`` judges a bundle; ``whole``: by all frames in any case."""
        detect = DetectMatch(matcher, self.config.num_candidates).eval()
        prototypes = {name: self._template(data, name) for name in data.references}
        return self._measured(detect, prototypes, data, progress, whole=whole)

    def _template(self, data: ObjectData, name: str) -> Array:
        """(P,) float32 of an object, from all of its references."""
        return references.mean_template(self.rows(data, name))

    @torch.no_grad()
    def rows(self, data: ObjectData, name: str) -> Array:
        """(R, P) float32: each reference of an object."""
        assert self.config.match is not None
        spec, share = self.config.reference_preprocess, self.config.match.object_share
        device = next(self.matcher.parameters()).device
        rows = []
        for each in data.references[name]:
            view = references.centred(spec, share, self._frames.view(each))
            picture = torch.from_numpy(apply(spec, [view.image])).to(device)
            box = torch.from_numpy(np.array([view.box], np.float32)).to(device)
            rows.append(self.matcher.encode(picture, box).cpu().numpy())
        return np.concatenate(rows)
