"""How ``noising`` is "trained": one pass over the normal images, then a bank and its statistics."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor, nn
from torch.utils.data import DataLoader

from runtime import datasets
from runtime.bundle import Threshold, write_atomic
from runtime.errors import DatasetError
from runtime.systems.noising import ablation, fit, target_mask
from runtime.tensors import Array
from training import backbones
from training.data import fingerprint, loader
from training.run import Run
from training.systems.noising.config import TaskConfig
from training.systems.noising.data import Images
from training.systems.noising.model import PatchFeatures
from training.task import Position, Progress

_log = logging.getLogger(__name__)
_FEATURES_NAME = "features.float32"


def build_model(
    config: TaskConfig, *, weights: bool = True
) -> tuple[PatchFeatures, dict[str, str]]:
    """The frozen feature net and where its weights came from.

    Args:
        weights: False leaves random numbers, for a checkpoint to replace.

    Raises:
        ConfigError, WeightsError: from ``training.backbones``.
    """
    backbone = backbones.create(config.backbone, seed=config.train.seed, weights=weights)
    model = PatchFeatures(backbone.net, backbone.channels, config.width)
    return model.requires_grad_(False).eval(), backbone.provenance


class Task:
    """See ``training.task.Task``."""

    best: tuple[str, Literal["max", "min"]] | None = None

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
        self.data_summary: dict[str, JsonValue] = {
            "folder": data.resolve().name,
            "num_train": len(files),
            "sha256": fingerprint(data, files),
        }
        self.model, provenance = build_model(config, weights=weights)
        self.provenance: dict[str, JsonValue] = {**provenance}
        height, width = config.preprocess.size
        self.grid = self.model.grid(height, width)
        self.features_path = root / _FEATURES_NAME

    def loader(self) -> DataLoader[Any]:
        return loader(
            Images(self.samples, self.config.preprocess), self.config.train, shuffle=False
        )

    def step(self, model: nn.Module, batch: Any, position: Position) -> Mapping[str, Tensor]:
        """Write the features of a batch to their place in the file; there is no loss."""
        rows_BND = model(batch["images"]).float().cpu().numpy()
        self._features()[batch["index"].cpu().numpy()] = rows_BND
        return {}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {}  # nothing to judge before the bank is fitted

    def finish(self, run: Run, model: nn.Module, progress: Progress) -> dict[str, JsonValue]:
        """Fit the bank, write it, and measure what each signal earns where labels are given."""
        size = self.config.preprocess.size
        fitted = fit(
            self._features(),
            self.grid,
            size,
            self.config.fit,
            seed=self.config.train.seed,
            progress=lambda done, of: progress("coreset", done, of),
        )
        fitted.bank.save(run.root / "bank.faiss")
        thresholds = dict(fitted.thresholds)
        results: dict[str, JsonValue] = {"fit": fitted.report}
        if self.labelled:
            judged = self._judged(model, progress)
            found = ablation(fitted.bank, fitted.params, size, judged)
            results["ablation"] = cast(JsonValue, found)
            for name in fitted.thresholds:  # offered beside the budget's; none is taken by itself
                if (best := found["shipped"].get(f"{name}_f1max_threshold")) is not None:
                    source = f"largest F1 on {len(self.labelled)} labelled images"
                    thresholds |= {f"{name}_f1max": Threshold(value=best, source=source)}
        _write_json(run.root / "params.json", fitted.params.model_dump(mode="json"))
        _write_json(
            run.root / "thresholds.json",
            {name: threshold.model_dump(mode="json") for name, threshold in thresholds.items()},
        )
        self.features_path.unlink()
        return results

    def _features(self) -> np.memmap[Any, Any]:
        """The file of all features (images, N, D): on disk, because they may outgrow memory."""
        shape = (len(self.samples), self.grid[0] * self.grid[1], self.model.width)
        mode: Literal["r+", "w+"] = "r+" if self.features_path.is_file() else "w+"
        return np.memmap(self.features_path, np.float32, mode, shape=shape)

    def _judged(
        self, model: nn.Module, progress: Progress
    ) -> Iterator[tuple[Array, int, Array | None]]:
        """Features, label and mask of each test image."""
        spec = self.config.preprocess
        device = next(model.parameters()).device
        images = Images(self.labelled, spec)
        rng = np.random.default_rng(0)
        for i, sample in enumerate(self.labelled):
            images_BCHW = images.get(i, rng)["images"][None].to(device)
            with torch.no_grad():
                features_ND = model(images_BCHW)[0].float().cpu().numpy()
            yield features_ND, sample.label, target_mask(sample, spec)
            progress("ablation", i + 1, len(self.labelled))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
