"""How ``noising`` is trained: by one pass over the normal images, then a bank and its statistics;
or by a discriminator that learns on their features, computed once or, where the pictures are
changed, in each step.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor, nn
from torch.utils.data import DataLoader

from engineworks.runtime import datasets, files
from engineworks.runtime.bank import Bank
from engineworks.runtime.bundle import Threshold
from engineworks.runtime.errors import DatasetError, RunError
from engineworks.runtime.evaluation import Evaluation
from engineworks.runtime.metrics import AnomalyMetrics
from engineworks.runtime.systems.noising import target_mask
from engineworks.runtime.systems.noising.ablation import Labelled, ablation
from engineworks.runtime.systems.noising.fit import calibrate, fit, hold_out
from engineworks.runtime.systems.noising.params import DiscriminatorParams, Params
from engineworks.runtime.systems.noising.signals import anomaly_map, image_score
from engineworks.runtime.tensors import Array
from engineworks.training import backbones, ranks
from engineworks.training.data import WHOLE, Samples, fingerprint, iterate, loader
from engineworks.training.profiler import section
from engineworks.training.ranks import Part
from engineworks.training.run import Run
from engineworks.training.systems.noising.config import TaskConfig
from engineworks.training.systems.noising.data import Augmented, Images, Patches
from engineworks.training.systems.noising.discriminator import (
    PARTS,
    Discriminator,
    DiscriminatorTraining,
)
from engineworks.training.systems.noising.model import PatchFeatures
from engineworks.training.task import Criterion, Position, Progress

_FEATURES_NAME = "features.float32"


def build_model(
    config: TaskConfig, *, weights: bool = True
) -> tuple[PatchFeatures | DiscriminatorTraining, dict[str, str]]:
    """The frozen feature net, within what trains a discriminator where that is the judge; and
    where its weights came from.

    Args:
        weights: False leaves random numbers, for a checkpoint to replace.

    Raises:
        ConfigError, WeightsError: from ``training.backbones``.
    """
    backbone = backbones.create(
        config.backbone, seed=config.train.seed, weights=weights, size=config.preprocess.size
    )
    features = PatchFeatures(
        backbone.net,
        backbone.channels,
        config.width,
        config.neighbourhood,
        config.scale,
        _patches(config, backbone.grids),
        config.deep,
    )
    features.requires_grad_(False).eval()
    if config.judge == "bank":
        return features, backbone.provenance
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        return DiscriminatorTraining(features, config.discriminator), backbone.provenance


def _patches(config: TaskConfig, grids: Sequence[tuple[int, int]]) -> int | None:
    """Number of the map whose positions are the patches; see ``TaskConfig.stride``."""
    if config.stride is None:
        return None
    height, width = config.preprocess.size
    fine = [
        i
        for i, (h, w) in enumerate(grids)
        if h * config.stride >= height and w * config.stride >= width
    ]
    return min(fine, key=lambda i: grids[i][0] * grids[i][1]) if fine else None


class Task:
    """See ``training.task.Task``."""

    written = ("bank.faiss", "params.json", "thresholds.json")
    working = (f"{Path(_FEATURES_NAME).stem}.*",)
    best: tuple[Criterion, ...] = ()

    def __init__(self, config: TaskConfig, data: Path, root: Path, *, weights: bool = True) -> None:
        self.config = config
        self.samples = datasets.mvtec(data, "train")
        untested = (data / "train").is_dir() and not (data / "test").is_dir()
        self.labelled = [] if untested else datasets.mvtec(data, "test")
        if not self.samples:
            raise DatasetError(
                f"{data} has no training images", fix="put normal images into train/good"
            )
        files = [sample.path for sample in self.samples]
        self.dataset = datasets.mvtec_labels(data)
        self.data_summary: dict[str, JsonValue] = {
            "folder": data.resolve().name,
            "num_train": len(files),
            "sha256": fingerprint(data, files),
        }
        self.model, provenance = build_model(config, weights=weights)
        self.provenance: dict[str, JsonValue] = {**provenance}
        self.has_weights = weights
        model = self.model
        self.features = model.features if isinstance(model, DiscriminatorTraining) else model
        height, width = config.preprocess.size
        self.grid = self.features.grid(height, width)
        self.features_path = root / _FEATURES_NAME
        copies = None if isinstance(model, DiscriminatorTraining) else config.copies
        self.images = Images(self.samples, config.preprocess, copies, config.tiles)

    def loader(self) -> DataLoader[Any]:
        config, spec = self.config, self.config.preprocess
        if not isinstance(self.model, DiscriminatorTraining):
            part = ranks.part()
            return loader(self.images, config.train, shuffle=False, part=part, whole=True)
        self._extract()
        settings, seed = config.discriminator, config.train.seed
        learned, _ = hold_out(len(self.samples), config.fit, seed=seed)
        features_IND = self._features()
        self.model.discriminator.fit(features_IND[learned])
        self.model.proposal.fit(features_IND[learned], seed=seed)
        batches: Samples = Patches(
            features_IND,
            learned,
            steps=settings.steps,
            patches=settings.patches,
            part=ranks.part(),
        )
        if settings.augment is not None:
            batches = Augmented(
                [self.samples[i] for i in learned],
                spec,
                settings.augment,
                steps=settings.steps,
                batch_size=config.train.batch_size,
                part=ranks.part(),
            )
        return loader(batches, config.train, shuffle=False, batched=True)

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """The net, and the noise's shares that move against it."""
        assert isinstance(self.model, DiscriminatorTraining)
        return [
            (list(self.model.discriminator.parameters()), 1.0),
            (list(self.model.proposal.parameters()), self.config.discriminator.adversary),
        ]

    def pace(self, epoch: int) -> float:
        return 1.0

    def step(self, model: nn.Module, batch: Any, position: Position) -> Mapping[str, Tensor]:
        """Losses of a discriminator. For a bank there are none: the features of the batches of all
        ranks are written to their place in the file.
        """
        if not isinstance(self.model, DiscriminatorTraining):
            self._keep(self._features, model, batch)
            return {}
        if "rows" in batch:
            rows_ND = batch["rows"]
        else:
            with torch.no_grad(), section("features"):
                patches_ND = self.features(batch["images"]).float().flatten(0, 1)
            num, cpu = self.config.discriminator.patches, torch.device("cpu")
            rows_ND = patches_ND[ranks.draw(len(patches_ND), num, cpu).to(patches_ND.device)]
        with section("discriminator"):
            return cast(Mapping[str, Tensor], model(rows_ND))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {}  # the labelled images judge what is made of all epochs, in ``finish``

    def finish(self, run: Run, model: nn.Module, progress: Progress) -> dict[str, JsonValue]:
        """Fit a bank, or scale what the discriminator says; judge it where labels are given.

        Raises:
            RunError: the features are gone, as they are once a run has finished.
        """
        if not self.features_path.is_file():
            raise self._lost()
        trained = isinstance(self.model, DiscriminatorTraining)
        return (self._finish_discriminator if trained else self._finish_bank)(run, progress)

    def _finish_bank(self, run: Run, progress: Progress) -> dict[str, JsonValue]:
        size = self.config.preprocess.size
        fitted = fit(
            self._features(),
            self.grid,
            size,
            self.config.fit,
            seed=self.config.train.seed,
            widths=self.features.widths,
            pictures_I=self.images.pictures_I,
            copies_I=self.images.copies_I,
            progress=progress,
        )
        fitted.bank.save(run.root / "bank.faiss")
        if fitted.foreground is not None:
            content = io.BytesIO()
            np.save(content, fitted.foreground.direction_D)
            files.write(run.root / "foreground.npy", content.getvalue())
        results: dict[str, JsonValue] = {"fit": fitted.report}
        image = fitted.thresholds["image"].value
        for title, found in (
            ("look at these: they stand out of the normal pictures", fitted.outstanding),
            ("left out: taken as contamination", fitted.left_out),
        ):
            if found:
                results[title] = {
                    self.samples[picture].path.name: {"score": score, "border": image}
                    for picture, score in found.items()
                }
        shipped: Mapping[str, float] = {}
        if self.labelled:
            earned = ablation(
                fitted.bank,
                fitted.params,
                size,
                self._labelled(progress),
                foreground=fitted.foreground,
            )
            judged = self._evaluation(earned.pop("shipped"), fitted.thresholds)
            shipped = judged.metrics
            each = {name: metrics.compute() for name, metrics in earned.items()}
            results["ablation"] = cast(JsonValue, {**each, "shipped": shipped})
            results["decisions"] = judged.to_json()["decisions"]
        params = fitted.params.model_copy(update={"tiles": self.config.tiles})
        self._write(run, params, fitted.thresholds, shipped)
        return results

    def _finish_discriminator(self, run: Run, progress: Progress) -> dict[str, JsonValue]:
        """Unit and thresholds from the images that were held out; the metrics beside those of the
        distance to the proposal's bank, which was there without any training.
        """
        assert isinstance(self.model, DiscriminatorTraining)
        settings, size = self.config.fit, self.config.preprocess.size
        discriminator, proposal = self.model.discriminator, self.model.proposal
        learned, held_out = hold_out(len(self.samples), settings, seed=self.config.train.seed)
        features_IND = self._features()
        scores_IN = np.stack([self._scores(discriminator, features_IND[i]) for i in held_out])
        params, thresholds = calibrate(scores_IN, self.grid, size, settings)
        shares = zip(PARTS, proposal.shares_P.tolist(), strict=True)
        results: dict[str, JsonValue] = {
            "fit": {
                "num_images": len(learned),
                "num_held_out": len(held_out),
                "bank_rows_of_proposal": len(proposal.bank_MD),
            },
            "shares of the noise": dict(shares),
        }
        metrics = {"discriminator": AnomalyMetrics(), "distance": AnomalyMetrics()}
        bank = Bank(proposal.bank_MD.cpu().numpy())
        for picture in self._labelled(progress):
            (features_ND,) = picture.features
            scored = {
                "discriminator": params.standardise(self._scores(discriminator, features_ND)),
                "distance": bank.search(features_ND, 1)[0][:, 0],
            }
            for name, scores_N in scored.items():
                map_HW = anomaly_map(scores_N, self.grid, size, settings.smoothing)
                score = image_score(params.image_score, scores_N, params.top)
                metrics[name].update(score, picture.label, map_HW, picture.mask_HW)
        shipped: Mapping[str, float] = {}
        if self.labelled:
            judged = self._evaluation(metrics["discriminator"], thresholds)
            shipped = judged.metrics
            distance = metrics["distance"].compute()
            results["judges"] = cast(JsonValue, {"discriminator": shipped, "distance": distance})
            results["decisions"] = judged.to_json()["decisions"]
        self._write(run, params, thresholds, shipped)
        return results

    def _evaluation(
        self, metrics: AnomalyMetrics, thresholds: Mapping[str, Threshold]
    ) -> Evaluation:
        """Of what is shipped, on the labelled images."""
        kinds = [sample.defect for sample in self.labelled]
        return metrics.evaluation("image", thresholds["image"].value, kinds)

    def _write(
        self,
        run: Run,
        params: Params | DiscriminatorParams,
        thresholds: Mapping[str, Threshold],
        metrics: Mapping[str, float],
    ) -> None:
        """params.json and thresholds.json: the budget's, and beside them what the labelled images
        would choose; none of those is taken by itself.
        """
        offered = {
            f"{name}_f1max": Threshold(
                value=metrics[f"{name}_f1max_threshold"],
                source=f"largest F1 on {len(self.labelled)} labelled images",
            )
            for name in thresholds
            if f"{name}_f1max_threshold" in metrics
        }
        _write_json(run.root / "params.json", params.model_dump(mode="json"))
        _write_json(
            run.root / "thresholds.json",
            {n: t.model_dump(mode="json") for n, t in {**thresholds, **offered}.items()},
        )

    def _extract(self) -> None:
        """The features of all training images as they are, computed once for all epochs.

        Raises:
            RunError: a resumed run has lost them; its checkpoint comes too late to make them anew.
        """
        if ranks.tell(self.features_path.is_file()):
            return
        if not self.has_weights:
            raise self._lost()
        partial = self.features_path.with_suffix(".partial")
        file = cache(lambda: self._features(partial, "w+"))
        with torch.no_grad(), section("features"):
            for batch in self._batches(self.samples, ranks.part()):
                self._keep(file, self.features, batch)
        if ranks.is_main():
            file().flush()
            partial.rename(self.features_path)
        ranks.wait()

    def _keep(
        self, file: Callable[[], np.memmap[Any, Any]], net: nn.Module, batch: Mapping[str, Tensor]
    ) -> None:
        """Compute the features of a batch; the main process writes those of all ranks."""
        rows_BND = ranks.gather(net(batch["images"].to(self._device)).float())
        index_B = ranks.gather(batch["index"].to(self._device))
        if ranks.is_main():
            file()[index_B.cpu().numpy()] = rows_BND.cpu().numpy()

    def _lost(self) -> RunError:
        return RunError(
            f"{self.features_path} is gone, which the run cannot go on without",
            fix="train again into a new folder",
        )

    def _features(
        self, path: Path | None = None, mode: Literal["r+", "w+"] | None = None
    ) -> np.memmap[Any, Any]:
        """The file of all features (images, N, D): on disk, because they may outgrow memory."""
        shape = (len(self.images), self.grid[0] * self.grid[1], self.features.width)
        path = path or self.features_path
        mode = mode or ("r+" if path.is_file() else "w+")
        if mode == "w+":
            # a full disk would end the process by SIGBUS where a page of a hole is written
            files.allocate(path, math.prod(shape) * np.float32().itemsize)
        return np.memmap(path, np.float32, "r+", shape=shape)

    @property
    def _device(self) -> torch.device:
        return next(self.features.parameters()).device

    @torch.no_grad()
    def _scores(self, discriminator: Discriminator, features_ND: Array) -> Array:
        """The discriminator's logits of an image's patches: (N,) float32."""
        rows_ND = torch.from_numpy(np.ascontiguousarray(features_ND)).to(self._device)
        return np.asarray(discriminator(rows_ND).cpu().numpy())

    def _batches(
        self, samples: Sequence[datasets.MvtecSample], part: Part = WHOLE
    ) -> Iterator[Any]:
        """All images of a list as at inference, in its order; of several ranks each its batches."""
        images = Images(list(samples), self.config.preprocess)
        return iterate(loader(images, self.config.train, shuffle=False, part=part, whole=True))

    def _labelled(self, progress: Progress) -> Iterator[Labelled]:
        """Features, label and mask of each test image."""
        spec = self.config.preprocess
        images = Images(self.labelled, spec, tiles=self.config.tiles)
        rng = np.random.default_rng(0)

        def features(i: int) -> Array:
            images_BCHW = images.get(i, rng)["images"][None].to(self._device)
            with torch.no_grad():
                return np.asarray(self.features(images_BCHW)[0].float().cpu().numpy())

        for i, sample in enumerate(self.labelled):
            layout = images.layouts[i]
            mask = target_mask(sample, spec, layout.size if layout else None)
            yield Labelled(map(features, images.tiles_of(i)), sample.label, mask, layout)
            progress("judged images", i + 1, len(self.labelled))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    files.write(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
