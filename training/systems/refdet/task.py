"""How ``refdet`` is trained: episodes of frames and references, in stages, judged as it is run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, cast

import torch
from pydantic import JsonValue
from torch import Tensor, nn
from torch.utils.data import DataLoader

from engineworks.runtime import files, references
from engineworks.runtime.evaluation import Evaluation
from engineworks.runtime.frames import Frames
from engineworks.runtime.objects import ObjectData, object_labels, object_splits, read_objects
from engineworks.runtime.preprocess import apply
from engineworks.runtime.systems.refdet import detecting
from engineworks.runtime.tensors import Array
from engineworks.training import ranks
from engineworks.training.backbones import feature_cache
from engineworks.training.data import fingerprint, loader
from engineworks.training.profiler import section
from engineworks.training.run import Run, judged
from engineworks.training.systems.refdet.config import StageConfig, TaskConfig, WeightsConfig
from engineworks.training.systems.refdet.data import Episodes
from engineworks.training.systems.refdet.loss import Losses
from engineworks.training.systems.refdet.model import Detect, RefDet
from engineworks.training.task import Criterion, Position, Progress

_CONTRASTIVE = ("prototype", "supervised", "proposals", "triplet")
_ENCODED = 16  # references at once, where nothing is learnt
_BUNDLED = 8  # objects whose references the bundle holds, at most
_CACHE_BYTES = 256 << 20  # of decoded frames that the network is judged by


class Training(nn.Module):
    """The nets within what trains them; ``net`` is what is exported."""

    def __init__(self, net: RefDet, losses: Losses) -> None:
        super().__init__()
        self.net = net
        self.losses = losses

    def forward(
        self, batch: Mapping[str, Any], features_RF: Tensor | None, weights: WeightsConfig
    ) -> dict[str, Tensor]:
        """Losses of an episode.

        Args:
            batch: see ``data``.
            features_RF: of its pictures, which are this rank's, where they are known; None: they
                are computed here.
        """
        prompted_BN = batch["prompted"]
        with section("encoder"):
            if features_RF is None:
                features_RF = self.net.encoder.features(batch["pictures"])
            rows_RP = ranks.gather(self.net.encoder(features_RF))
            whose_R = batch["object_of_picture"]
            prototypes_NP = self.net.prototypes(rows_RP, whose_R, prompted_BN.shape[1])
        output = self.net.detector(batch["images"], prototypes_NP, prompted_BN)
        with section("loss"), torch.autocast(prompted_BN.device.type, enabled=False):
            losses: dict[str, Tensor] = self.losses(
                output, rows_RP.float(), prototypes_NP.float(), batch, weights
            )
        return losses


def build_model(
    config: TaskConfig, num_base: int, *, weights: bool = True
) -> tuple[Training, dict[str, str]]:
    """The nets within what trains them, and where the encoder's weights came from.

    Args:
        num_base: base classes; 0: no branch for them.
        weights: False leaves random numbers, for a checkpoint to replace.

    Raises:
        ConfigError, WeightsError: from ``training.backbones``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        net = RefDet(
            config.encoder,
            config.detector,
            num_base,
            reference_size=config.reference_preprocess.size,
            seed=config.train.seed,
            weights=weights,
        )
    return Training(net, Losses(config.loss, num_base)), net.provenance


class Finder(Protocol):
    """A graph ``detect`` in eager torch, in two parts: frames are seen once for all objects."""

    def see(self, frames_BCHW: Tensor, /) -> Any:
        """What is seen of frames, whatever is looked for."""

    def answer(self, seen: Any, prototypes_NP: Tensor, /) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (B, M, 4) xyxy in pixels, scores (B, M) in [0, 1], classes (B, M) int64."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of both parts."""


class Task:
    """See ``training.task.Task``, and ``Paced`` there.

    Judged by objects that training never sees: by the split ``val`` where there is one, and the
    best epoch is kept. By ``test`` where there is only that, and the last epoch is kept: a test set
    that chooses is no test.
    """

    written: ClassVar[tuple[str, ...]] = ("labels.json", "learned.json", "references.npz")
    working = ()
    at_once = 1  # see ``runtime.systems.refdet.detecting.Params``

    def __init__(self, config: TaskConfig, data: Path, root: Path, *, weights: bool = True) -> None:
        self.config = config
        splits = object_splits(data)
        self.judged_by: Literal["val", "test"] | None = (
            "val" if "val" in splits else "test" if "test" in splits else None
        )
        self.training = self.read_training(data)
        self.judged = (
            None
            if self.judged_by is None
            else read_objects(data, self.judged_by, hold_out=config.hold_out)
        )
        self.best: tuple[Criterion, ...] = (
            (("map50", "max"), ("loss", "min")) if self.judged_by == "val" else ()
        )
        self.labels = sorted(self.training.references) if config.base else []
        self.dataset = object_labels(data)
        self.data_summary: dict[str, JsonValue] = {
            "folder": data.resolve().name,
            "num_train": len(self.training.frames),
            "num_objects": len(self.training.references),
            "judged_by": self.judged_by,
            "sha256": fingerprint(data, self.training.files()),
        }
        self._frames = Frames(_CACHE_BYTES)
        self.set_up(weights)

    def read_training(self, data: Path) -> ObjectData:
        """The split that is learned."""
        return read_objects(data, "train", hold_out=self.config.hold_out)

    def set_up(self, weights: bool) -> None:
        """Make what is trained; ``weights`` as of ``build_model``."""
        config = self.config
        made, provenance = build_model(config, len(self.labels), weights=weights)
        self.model: nn.Module = made
        self.net = made.net
        self.provenance: dict[str, JsonValue] = {**provenance}
        self.cache = feature_cache(
            config.encoder,
            self.net.encoder.net,
            max_bytes=config.encoder.cache_bytes,
        )
        self._learning = {
            name: [p for p in part.parameters() if p.requires_grad]
            for name, part in self._parts().items()
        }

    def loader(self) -> DataLoader[Any]:
        episodes = Episodes(self.training, self.config, ranks.part())
        return loader(episodes, self.config.train, shuffle=False, batched=True)

    def step(self, model: nn.Module, batch: Any, position: Position) -> Mapping[str, Tensor]:
        self._enter(self.stage(position.epoch))
        features_RF = None
        if self.net.encoder.frozen:
            with section("encoder"):
                features_RF = self.cache.features(self.net.encoder.features, batch["pictures"])
        losses = model(batch, features_RF, self.weights(position.epoch))
        return cast(Mapping[str, Tensor], losses)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        assert isinstance(model, Training)
        return {} if self.judged is None else self._judge(model.net, self.judged).metrics

    def finish(self, run: Run, model: nn.Module, progress: Progress) -> dict[str, JsonValue]:
        """Write the base classes' names, and what the bundle looks for unless told otherwise."""
        assert isinstance(model, Training)
        files.write(run.root / "labels.json", json.dumps(self.labels, indent=2) + "\n")
        files.write(run.root / "learned.json", json.dumps(self.learned(), indent=2) + "\n")
        self._save_references(run)
        results: dict[str, JsonValue] = {
            "parameters": {name: num for name, num, _ in model.net.parameter_table()},
            "encoder_cache": {
                "hits": self.cache.hits,
                "misses": self.cache.misses,
                "bytes": self.cache.num_bytes,
            },
        }
        if self.judged is not None:
            found = self._judge(model.net, self.judged, progress)
            results |= judged(str(self.judged_by), found)
        return results

    def learned(self) -> list[str]:
        """Names of the objects that training shows."""
        return sorted(self.training.references)

    def _save_references(self, run: Run) -> None:
        """Those of a few objects, which the bundle looks for unless told otherwise."""
        shown = self.training if self.judged is None else self.judged
        pictures = {
            name: [self._frames.view(each) for each in shown.references[name]]
            for name in sorted(shown.references)[:_BUNDLED]
        }
        match = self.config.match
        references.save_references(
            run.root / "references.npz",
            pictures,
            self.config.reference_preprocess,
            None if match is None else match.object_share,
        )

    # --- stages and rates ------------------------------------------------------------------------

    def stage(self, epoch: int) -> StageConfig:
        """The stage that an epoch, from 0, belongs to."""
        return [stage for stage in self.config.stages if stage.start <= epoch][-1]

    def weights(self, epoch: int) -> WeightsConfig:
        """Of the losses in an epoch, from 0."""
        config, weights = self.config.loss, self.stage(epoch).weights
        if config.contrastive_until is None or epoch < config.contrastive_until:
            return weights
        factor = config.contrastive_factor
        return weights.model_copy(update={n: getattr(weights, n) * factor for n in _CONTRASTIVE})

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        rates = self.config.rates
        factors = {"backbone": rates.backbone, "fusion": rates.fusion, "head": rates.head}
        net = set(self.net.encoder.net.parameters())
        encoder = self._learning["encoder"]
        groups = [(self._learning[name], factor) for name, factor in factors.items()]
        groups.append(([p for p in encoder if p not in net], rates.head))
        groups.append(([p for p in encoder if p in net], rates.encoder))
        return [(parameters, factor) for parameters, factor in groups if parameters]

    def pace(self, epoch: int) -> float:
        return self.stage(epoch).lr

    def _parts(self) -> dict[str, nn.Module]:
        net = self.net
        detector = net.detector
        return {
            "backbone": detector.backbone,
            "fusion": detector.fusion,
            "head": detector.head,
            "encoder": net.encoder,
        }

    def _enter(self, stage: StageConfig) -> None:
        """Let learn what may learn in a stage; a part that is frozen keeps its statistics too."""
        for name, part in self._parts().items():
            frozen = name in stage.frozen
            if frozen == part.training:
                part.train(not frozen)
            for parameter in self._learning[name]:
                parameter.requires_grad_(not frozen)

    # --- judging ---------------------------------------------------------------------------------

    def _judge(self, net: RefDet, data: ObjectData, progress: Progress | None = None) -> Evaluation:
        """How it does on a split, as ``runtime.systems.refdet`` measures them in a bundle."""
        detect = Detect(net, self.config.num_candidates).eval()
        prototypes = {name: self._prototype(net, data, name) for name in data.references}
        return self._measured(detect, prototypes, data, progress)

    def _measured(
        self,
        detect: Finder,
        prototypes: Mapping[str, Array],
        data: ObjectData,
        progress: Progress | None,
        *,
        whole: bool = False,
    ) -> Evaluation:
        device = next(detect.parameters()).device
        last: tuple[Array, Any] | None = None  # frames come again, for each object

        @torch.no_grad()
        def run(images_BCHW: Array, prototypes_NP: Array) -> tuple[Array, Array, Array]:
            nonlocal last
            if last is None or last[0] is not images_BCHW:
                last = images_BCHW, detect.see(torch.from_numpy(images_BCHW).to(device))
            answer = detect.answer(last[1], torch.from_numpy(prototypes_NP).to(device))
            boxes_BM4, scores_BM, classes_BM = (each.cpu().numpy() for each in answer)
            return boxes_BM4, scores_BM, classes_BM

        def report(done: int, of: int) -> None:
            if progress is not None:
                progress("evaluation", done, of)

        return detecting.evaluate(
            run,
            prototypes,
            data.frames,
            self._frames.read,
            self.config.preprocess,
            self.config.inference.model_copy(update={"max_evaluated": None})
            if whole
            else self.config.inference,
            labels=self.labels,
            learned=self.learned(),
            at_once=self.at_once,
            progress=report,
        )

    @torch.no_grad()
    def _prototype(self, net: RefDet, data: ObjectData, name: str) -> Array:
        """(P,) float32 of an object, from all of its references as they are."""
        pictures_RCHW = torch.from_numpy(
            apply(self.config.reference_preprocess, self._pictures(data, name))
        ).to(next(net.parameters()).device)
        rows = [net.encoder(net.encoder.features(p)) for p in torch.split(pictures_RCHW, _ENCODED)]
        return references.average(torch.cat(rows).float().cpu().numpy(), net.detector.widths)

    def _pictures(self, data: ObjectData, name: str) -> Sequence[Array]:
        return [self._frames.reference(each) for each in data.references[name]]
