"""How ``paco`` is trained: two views of every picture through one net, or a classifier alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import JsonValue
from torch import Tensor, nn
from torch.utils.data import DataLoader

from engineworks.runtime import datasets, draw, files, images
from engineworks.runtime.bundle import sha256_file
from engineworks.runtime.confidence import Confidence
from engineworks.runtime.errors import ConfigError, DatasetError
from engineworks.runtime.metrics import ClassificationMetrics
from engineworks.runtime.names import file_name
from engineworks.runtime.preprocess import place
from engineworks.runtime.tensors import Array
from engineworks.training import backbones, ranks
from engineworks.training.data import WHOLE, Samples, fingerprint, iterate, loader, preprocess
from engineworks.training.features import FeatureCache
from engineworks.training.ranks import Part
from engineworks.training.run import Run, judged, open_run, read_json
from engineworks.training.systems.paco.config import TaskConfig
from engineworks.training.systems.paco.data import Pictures, Views
from engineworks.training.systems.paco.model import Paco, PacoTraining
from engineworks.training.task import Criterion, Position, Progress

_NET = "net."  # within what trains it
# strongest part first
_PART_COLOURS = ((255, 40, 40), (255, 170, 0), (60, 200, 60), (40, 120, 255))


class Probe(nn.Module):
    """The classifier alone, on features that were computed once."""

    def __init__(self, net: Paco, label_smoothing: float) -> None:
        super().__init__()
        self.net = net
        self.net.backbone.requires_grad_(False)
        self.label_smoothing = label_smoothing

    def forward(self, embedding_BF: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        logits_BC = self.net.classifier(embedding_BF)
        loss = F.cross_entropy(logits_BC, labels_B, label_smoothing=self.label_smoothing)
        accuracy = ranks.mean_loss((logits_BC.argmax(1) == labels_B).float())
        return {"loss": loss * ranks.weight(len(labels_B)), "accuracy": accuracy}


class Embeddings:
    """Features of pictures as samples, for ``training.data.loader``."""

    def __init__(self, embedding_NF: Array, labels: Sequence[int]) -> None:
        self.embedding_NF = embedding_NF
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def get(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        return {"embedding": self.embedding_NF[index], "label": self.labels[index]}


def trained_weights(run: Run) -> dict[str, Tensor]:
    """What a run keeps of its ``Paco``, under the net's own names.

    Raises:
        RunError, WeightsError: the run has no weights, or damaged ones.
    """
    tensors = backbones.read_weights(run.weights())
    return {n.removeprefix(_NET): tensor for n, tensor in tensors.items() if n.startswith(_NET)}


def build_model(
    config: TaskConfig, num_classes: int, *, num_pictures: int = 0, weights: bool = True
) -> tuple[PacoTraining | Probe, dict[str, str]]:
    """The net within what trains it, and where its weights came from; export takes ``.net``.

    Args:
        num_pictures: of the training set, for ``parts.refresh``.
        weights: False leaves random numbers, for a checkpoint to replace.

    Raises:
        ConfigError, WeightsError: from ``training.backbones``; or the whole net is to learn while
            an engine runs the backbone.
    """
    if config.backbone.engine is not None and not config.frozen:
        raise ConfigError(
            "a backbone that an engine runs cannot learn, and frozen is false",
            fix="set frozen to true, or backbone.engine to null",
        )
    backbone = backbones.create(
        config.backbone, seed=config.train.seed, weights=weights, size=config.preprocess.size
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        net = Paco(backbone.net, backbone.channels[0], num_classes)
        if config.frozen:
            return Probe(net, config.loss.label_smoothing), backbone.provenance
        model = PacoTraining(
            net, config.parts, config.loss, num_classes=num_classes, num_pictures=num_pictures
        )
    return model, backbone.provenance


class Task:
    """See ``training.task.Task``.

    Judged by the folder ``val`` where there is one, and the best epoch is kept. By ``test`` where
    there is only that, and the last epoch is kept: a test set that chooses is no test.
    """

    written = ("labels.json", "confidence.json", "confusion.png", "parts")
    working = ()

    def __init__(self, config: TaskConfig, data: Path, root: Path, *, weights: bool = True) -> None:
        self.config = config
        self.training = datasets.class_folder(data, "train")
        self.labels = list(self.training.labels)
        if len(self.labels) < 2:
            raise DatasetError(
                f"{data} has pictures of one class alone",
                fix="a classifier needs at least two classes to tell apart",
            )
        splits = datasets.class_splits(data)
        self.judged_by = next((split for split in ("val", "test") if split in splits), None)
        self.judged = (
            None if self.judged_by is None else datasets.class_folder(data, self.judged_by)
        )
        self.best: tuple[Criterion, ...] = (
            (("top1", "max"), ("nll", "min")) if self.judged_by == "val" else ()
        )
        self.dataset = datasets.class_labels(data)
        self.data_summary: dict[str, JsonValue] = {
            "folder": data.resolve().name,
            "num_train": len(self.training.samples),
            "num_classes": len(self.labels),
            "judged_by": self.judged_by,
            "sha256": fingerprint(data, self.training.files),
        }
        warm = weights and config.warm_start is not None
        self.model, provenance = build_model(
            config,
            len(self.labels),
            num_pictures=len(self.training.samples),
            weights=weights and not warm,
        )
        self.provenance: dict[str, JsonValue] = {**provenance}
        if warm:
            self.provenance = self._warm_start(Path(str(config.warm_start)))
        self._embeddings: dict[str, Array] = {}
        self.cache: FeatureCache | None = None
        if config.frozen and config.backbone.store is not None:  # nothing is asked for twice here
            self.cache = backbones.feature_cache(
                config.backbone, self.model.net.backbone, max_bytes=0
            )

    def loader(self) -> DataLoader[Any]:
        settings = self.config.train
        samples: Samples
        if self.config.frozen:
            labels = [sample.label for sample in self.training.samples]
            samples = Embeddings(self._embedded("train", self.training, ranks.part()), labels)
        else:
            samples = Views(
                self.training.samples,
                self.config.preprocess,
                self.config.views,
                read=datasets.read,
            )
        # a picture alone in the last batch has no negatives, and its norms no statistics
        alone = len(samples) % settings.batch_size == 1
        return loader(samples, settings, shuffle=True, drop_last=alone, part=ranks.part())

    def step(self, model: nn.Module, batch: Any, position: Position) -> Mapping[str, Tensor]:
        if self.config.frozen:
            return cast(Mapping[str, Tensor], model(batch["embedding"], batch["label"]))
        losses = model(
            batch["views"].transpose(0, 1),
            batch["label"],
            ramp=self._ramp(position),
            epoch=position.epoch,
            index_B=batch["index"],
            affine_VB23=batch["affine"].transpose(0, 1),
        )
        return cast(Mapping[str, Tensor], losses)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        if self.judged is None:
            return {}
        return ClassificationMetrics.of(*self._judged_logits(model)).compute()

    def finish(self, run: Run, model: nn.Module, progress: Progress) -> dict[str, JsonValue]:
        """Write the labels; judge the kept weights, and draw what they confuse and look at.

        Where ``val`` judges, also say how sure they may be: a test set that is learned from is
        none.
        """
        files.write(run.root / "labels.json", json.dumps(self.labels, indent=2) + "\n")
        if self.judged is None:
            return {}
        logits_NC, label_N = self._judged_logits(model)
        metrics = ClassificationMetrics.of(logits_NC, label_N)
        if self.judged_by == "val":
            asked = self.config.confidence.model_dump()
            confidence, unknown = Confidence.fit(logits_NC, label_N, **asked)
            known = {"confidence": confidence.model_dump(), "unknown": unknown.model_dump()}
            files.write(run.root / "confidence.json", json.dumps(known, indent=2) + "\n")
        confusion = draw.confusion_matrix(metrics.confusion, self.labels)
        images.write(run.root / "confusion.png", confusion)
        if isinstance(model, PacoTraining):
            self._draw_parts(run.root / "parts", model)
        rates = zip(self.labels, *_rates(metrics.confusion), strict=True)
        results = {
            **judged(str(self.judged_by), metrics.evaluation(self.labels)),
            "classes": {label: {"recall": r, "precision": p} for label, r, p in rates},
        }
        return cast(dict[str, JsonValue], results)

    def _warm_start(self, folder: Path) -> dict[str, JsonValue]:
        """Fill the net from another run; where its weights came from.

        Raises:
            RunError, WeightsError: no run, or one without sound weights.
            ConfigError: a run of another system, net or set of classes.
        """
        run = open_run(folder)
        fix = "give a run of the same net on the same classes, or set warm_start to null"
        if not isinstance(run.config, TaskConfig):
            raise ConfigError(f"warm_start: {folder} is a run of '{run.info.system}'", fix=fix)
        labels = read_json(folder, "labels")
        if labels != self.labels:
            unlike = sorted(set(labels) ^ set(self.labels))
            raise ConfigError(
                f"warm_start: {folder} tells other classes apart: {', '.join(unlike[:4])}", fix=fix
            )
        theirs, ours = (c.backbone for c in (run.config, self.config))
        for field in ("name", "stages", "args"):
            if getattr(theirs, field) != getattr(ours, field):
                raise ConfigError(
                    f"warm_start: {folder} has backbone.{field} = {getattr(theirs, field)}, the "
                    f"configuration {getattr(ours, field)}",
                    fix=fix,
                )
        self.model.net.load_state_dict(trained_weights(run))
        return {
            **run.info.provenance,
            "warm_start": folder.name,
            "warm_start_sha256": sha256_file(run.weights()),
        }

    def _ramp(self, position: Position) -> float:
        """Share of lambda and eta in [0, 1], growing over the warm-up."""
        warmup = self.config.loss.warmup_epochs
        steps = -(-len(self.training.samples) // self.config.train.batch_size)
        done = position.epoch + position.batch / steps
        return 1.0 if done >= warmup else done / warmup

    def _judged_logits(self, model: Any) -> tuple[Array, Array]:
        """Logits (N, C) by ``model.net`` of the pictures that judge it, and their classes (N,)."""
        assert self.judged is not None
        if self.config.frozen:
            embedding_NF = torch.from_numpy(self._embedded("judged", self.judged))
            logits_NC = model.net.classifier(embedding_NF.to(_device(model)))
        else:
            logits_NC = torch.cat([model.net(batch)[0] for batch in self._batches(self.judged)])
        labels = [sample.label for sample in self.judged.samples]
        return logits_NC.detach().float().cpu().numpy(), np.array(labels)

    def _batches(self, folder: datasets.ClassFolder, part: Part = WHOLE) -> Iterator[Tensor]:
        """All pictures as at inference: (B, 3, height, width) float32 on the model's device.

        Args:
            part: of several ranks, each of which takes its batches.
        """
        pictures = Pictures(folder.samples, self.config.preprocess, read=datasets.read)
        batches = loader(pictures, self.config.train, shuffle=False, part=part, whole=True)
        for batch in iterate(batches):
            yield batch["images"].to(_device(self.model))

    def _embedded(self, name: str, folder: datasets.ClassFolder, part: Part = WHOLE) -> Array:
        """(N, F) float32 features of all pictures by the frozen net, computed once.

        Args:
            part: of several ranks, which compute them together.
        """
        if name not in self._embeddings:
            self.model.net.eval()
            rows = list[Tensor]()
            with torch.no_grad():
                for batch in self._batches(folder, part):
                    rows_BF = self._embed(batch).float().cpu()
                    rows.append(rows_BF if part == WHOLE else ranks.gather(rows_BF))
            # the last batch may have been taken by several ranks
            self._embeddings[name] = torch.cat(rows)[: len(folder.samples)].numpy()
        return self._embeddings[name]

    def _embed(self, images_BCHW: Tensor) -> Tensor:
        """(B, F) by the frozen net, or as an earlier run stored it."""
        net = self.model.net

        def compute(images_BCHW: Tensor) -> Tensor:
            return net.pool(net.features(images_BCHW))

        if self.cache is None:
            return compute(images_BCHW)
        return self.cache.features(compute, images_BCHW)

    def _draw_parts(self, folder: Path, model: PacoTraining) -> None:
        """Where the net looks, on a picture of each class, then on a second of each, and so on."""
        assert self.judged is not None
        seen = Counter[int]()
        turns = []
        for i, sample in enumerate(self.judged.samples):
            turns.append((seen[sample.label], i))
            seen[sample.label] += 1
        folder.mkdir(exist_ok=True)
        spec = self.config.preprocess
        for _, i in sorted(turns)[: self.config.num_overlays]:
            sample = self.judged.samples[i]
            pixels = place(spec, datasets.read(sample))
            peaks_BK2, grid = model.peaks(preprocess(spec, [pixels]).to(_device(model)))
            drawn = pixels
            for k, (row, column) in reversed(list(enumerate(peaks_BK2[0].tolist()))):
                mask_HW = _window(spec.size, grid, row, column, self.config.parts.window // 2)
                drawn = draw.contour(drawn, mask_HW, _PART_COLOURS[k % len(_PART_COLOURS)])
            images.write(folder / f"{file_name(sample.class_name)}_{i:05d}.png", drawn)


def _window(
    size: tuple[int, int], grid: tuple[int, int], row: int, column: int, half: int
) -> Array:
    """(height, width) bool: the pixels under the cells around a peak."""
    mask = np.zeros(size, bool)
    tops = [size[0] * max(0, row - half) // grid[0], size[1] * max(0, column - half) // grid[1]]
    ends = [size[0] * (row + half + 1) // grid[0], size[1] * (column + half + 1) // grid[1]]
    mask[tops[0] : ends[0], tops[1] : ends[1]] = True
    return mask


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _rates(confusion_CC: Array) -> tuple[list[float], list[float]]:
    """Recall and precision of each class; 0 where it never occurs, or is never said."""
    right = np.diag(confusion_CC)
    recall = right / np.maximum(confusion_CC.sum(1), 1)
    precision = right / np.maximum(confusion_CC.sum(0), 1)
    return recall.tolist(), precision.tolist()
