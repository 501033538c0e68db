"""How ``refdet`` learns to judge what matching finds; the net that sees stays frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from engineworks.runtime.errors import ConfigError
from engineworks.runtime.objects import LabelledFrame, ObjectData, read_objects
from engineworks.training import ranks
from engineworks.training.backbones import read_weights
from engineworks.training.data import loader
from engineworks.training.profiler import section
from engineworks.training.run import open_run
from engineworks.training.systems.refdet import match_task
from engineworks.training.systems.refdet.candidates import Batches, Candidates, collect
from engineworks.training.systems.refdet.config import RelationConfig
from engineworks.training.systems.refdet.loss import ciou
from engineworks.training.systems.refdet.match import DetectMatch
from engineworks.training.systems.refdet.relation import Relation, moved
from engineworks.training.task import Position


def losses(
    relation: Relation, batch: Mapping[str, Tensor], config: RelationConfig
) -> dict[str, Tensor]:
    """Of candidates: whether they are the object, and where it ends."""
    logits, moves = relation(batch["windows"], batch["facts"])
    overlaps = batch["overlaps"]
    right = overlaps >= config.right
    told = (right | (overlaps < config.wrong)).to(logits.dtype)
    each = F.binary_cross_entropy_with_logits(logits, right.to(logits.dtype), reduction="none")
    score = (each * told).sum() / _of_all(told)
    near = (overlaps >= config.wrong).to(logits.dtype)
    unit = moves.new_tensor([[-0.5, -0.5, 0.5, 0.5]])  # the candidate
    apart = ciou(moved(unit, moves), moved(unit, batch["moves"]))
    box = (apart * near).sum() / _of_all(near)
    return {"loss": score + config.box * box, "score": score, "box": box}


def _of_all(counts: Tensor) -> Tensor:
    """What sums of this rank are divided by: the sum of all ranks, at least 1, shared out."""
    return ranks.total(counts.sum()).clamp(min=1) / ranks.size()


class Task(match_task.Task):
    """See ``training.task.Task``; data and judging are those of matching."""

    def read_training(self, data: Path) -> ObjectData:
        return read_objects(data, "train", hold_out=self.config.hold_out)

    def frames_to_train_on(self) -> Sequence[LabelledFrame]:
        return self.training.frames

    def kept_back(self) -> list[str]:
        """Objects of the training that are not learned; none where there are few."""
        assert self.config.match is not None and self.config.match.relation is not None
        names = sorted(self.training.references)
        num = int(self.config.match.relation.kept_back * len(names))
        rng = np.random.default_rng(self.config.train.seed)
        return sorted(rng.permutation(names)[:num].tolist())

    def learned(self) -> list[str]:
        return sorted(set(self.training.references) - set(self.kept_back()))

    def unlearned(self) -> ObjectData | None:
        kept = {name: self.training.references[name] for name in self.kept_back()}
        return ObjectData(self.training.frames, kept) if kept else None

    def set_up(self, weights: bool) -> None:
        super().set_up(weights)
        assert self.matcher.relation is not None
        self.relation: Relation = self.matcher.relation.requires_grad_(True)
        if weights and self.config.warm_start is not None:
            self._warm_start(Path(self.config.warm_start))

    def _warm_start(self, folder: Path) -> None:
        """Go on from what another run has learned.

        Raises:
            ConfigError: it has learned nothing of the kind.
        """
        kept = {
            name.removeprefix("relation."): value
            for name, value in read_weights(open_run(folder).weights()).items()
            if name.startswith("relation.")
        }
        own = self.relation.state_dict()
        if {n: v.shape for n, v in kept.items()} != {n: v.shape for n, v in own.items()}:
            raise ConfigError(
                f"warm_start: {folder} has not learned to judge candidates as this one does",
                fix="give a run of `train refdet --config learn` with the same match.relation",
            )
        self.relation.load_state_dict(kept)
        self.provenance["warm_start"] = folder.name

    def loader(self) -> DataLoader[Any]:
        found = Candidates(*ranks.from_main(lambda: list(vars(self._candidates()).values())))
        batches = Batches(found, self.config.train.batch_size, ranks.part())
        return loader(batches, self.config.train, shuffle=False, batched=True)

    def _candidates(self) -> Candidates:
        config = self.config
        assert config.match is not None and config.match.relation is not None
        relation, frames = config.match.relation, self.training.frames
        if relation.frames is not None:
            frames = tuple(match_task.spread(frames, relation.frames))
        self.matcher.eval()  # its norms are those of the frozen net
        with section("features"):
            rows = {name: self.rows(self.training, name) for name in self.learned()}
            return collect(
                DetectMatch(self.matcher, config.num_candidates).eval(),
                ObjectData(frames, self.training.references),
                rows,
                self._frames,
                config.preprocess,
                relation,
                shots=config.episodes.shots,
                seed=config.train.seed,
                progress=lambda what, done, of: None,
            )

    def step(self, model: nn.Module, batch: Any, position: Position) -> Mapping[str, Tensor]:
        assert self.config.match is not None and self.config.match.relation is not None
        with section("relation"):
            return losses(self.relation, batch, self.config.match.relation)

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        return [(list(self.relation.parameters()), 1.0)]
