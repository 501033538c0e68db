"""How ``stripe`` is trained: painted tiles of good strips, judged as it is run, on whole strips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, JsonValue, RootModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from engineworks.runtime import datasets, files, planes
from engineworks.runtime.bundle import Threshold
from engineworks.runtime.evaluation import Evaluation
from engineworks.runtime.preprocess import PlanesSpec
from engineworks.runtime.systems import stripe
from engineworks.runtime.tensors import Array
from engineworks.training import ranks
from engineworks.training.data import fingerprint, loader
from engineworks.training.profiler import section
from engineworks.training.run import Run, judged
from engineworks.training.systems.stripe.config import TaskConfig
from engineworks.training.systems.stripe.data import Tiles, pack
from engineworks.training.systems.stripe.loss import focal
from engineworks.training.systems.stripe.model import Segment, build, multiply_adds
from engineworks.training.task import Criterion, Position, Progress

_NUM_PAINTED = 32  # tiles for calibration
_COUNTED = 128  # side in pixels of the tile that multiply-adds are counted on


def build_model(config: TaskConfig, *, weights: bool = True) -> tuple[Segment, dict[str, str]]:
    """The network, and where its weights came from.

    Args:
        weights: makes no difference here: they are random, from the run's seed, in any case.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        model = build(config)
    return model, {"network": config.network.name, "weights": f"random, seed {config.train.seed}"}


class Task:
    """See ``training.task.Task``.

    Judged by the folder ``valid`` where there is one, and the best epoch is kept. By ``test`` where
    there is only that, and the last epoch is kept: a test set that chooses is no test.
    """

    written = ("params.json", "preprocess.json", "thresholds.json", "painted")
    working = ("strips-*",)

    def __init__(self, config: TaskConfig, data: Path, root: Path, *, weights: bool = True) -> None:
        self.config = config
        self.root = root
        self.samples = datasets.strips(data, "train")
        self.judged_by: Literal["valid", "test"] | None = next(
            (split for split in ("valid", "test") if (data / split).is_dir()), None
        )
        self.judged = [] if self.judged_by is None else datasets.strips(data, self.judged_by)
        defective = [sample for sample in self.judged if sample.label]
        can_choose = self.judged_by == "valid" and all(s.mask_path for s in defective)
        self.best: tuple[Criterion, ...] = (
            (("pixel_ap", "max"), ("loss", "min")) if defective and can_choose else ()
        )
        self.dataset = datasets.strip_labels(data)
        self.data_summary: dict[str, JsonValue] = {
            "folder": data.resolve().name,
            "num_train": len(self.samples),
            "judged_by": self.judged_by,
            "sha256": fingerprint(data, [file for s in self.samples for file in s.paths]),
        }
        side = config.tiles.size
        self._spec = PlanesSpec(size=(side, side), multiple=config.network.stride)
        model, provenance = build_model(config, weights=weights)
        self.model = model.to(memory_format=torch.channels_last)  # twice as fast on a CPU
        self.provenance: dict[str, JsonValue] = {**provenance}

    def loader(self) -> DataLoader[Any]:
        with ranks.first_here():
            tiles = self._tiles()
        return loader(tiles, self.config.train, shuffle=True, part=ranks.part())

    def step(self, model: nn.Module, batch: Any, position: Position) -> Mapping[str, Tensor]:
        planes_BCHW = batch["planes"].float().contiguous(memory_format=torch.channels_last)
        with section("network"):
            logits_B1HW = model(planes_BCHW)
        with section("loss"):
            return {"loss": focal(logits_B1HW, batch["mask"], self.config.loss)}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return self._judge(model, None).metrics if self.judged else {}

    def finish(self, run: Run, model: nn.Module, progress: Progress) -> dict[str, JsonValue]:
        """Find the threshold of the kept weights, and write what the export needs.

        ``painted/`` holds tiles as they were trained on: INT8 ranges that are measured on good
        strips alone would cut off just what a defect excites.
        """
        tiles = self._tiles()
        strips = tiles.strips
        threshold = self._threshold(model, tiles, progress)
        inference = self.config.inference
        params = stripe.Params(value_range=self.config.value_range, inference=inference)
        _write(run.root / "params.json", params)
        size = Counter(strips.shapes).most_common(1)[0][0]
        _write(run.root / "preprocess.json", self._spec.model_copy(update={"size": size}))
        thresholds = RootModel[dict[str, Threshold]]({"candidate": threshold})
        _write(run.root / "thresholds.json", thresholds)
        for i, index in enumerate(np.linspace(0, len(tiles) - 1, _NUM_PAINTED).astype(int)):
            tile = tiles.get(int(index), np.random.default_rng((self.config.train.seed, i)))
            planes.write(run.root / f"painted/{i:03d}.tif", tile["planes"].transpose(1, 2, 0))
        results: dict[str, JsonValue] = {
            "network": {
                "parameters": sum(p.numel() for p in model.parameters()),
                "multiply_adds_per_pixel": multiply_adds(model, _COUNTED, _COUNTED) / _COUNTED**2,
            },
            "data": {"strips": len(strips), "packed_bytes": strips.num_bytes},
        }
        if self.judged_by is not None:
            results |= judged(self.judged_by, self._judge(model, threshold.value))
        return results

    def _tiles(self) -> Tiles:
        """Of the training strips, packed: now, or found as they were packed before."""
        folder = self.config.tiles.cache
        strips = pack(
            [sample.path for sample in self.samples],
            self.root if folder is None else Path(folder),
            str(self.data_summary["sha256"]),
        )
        return Tiles(strips, self.config)

    def _judge(self, model: nn.Module, threshold: float | None) -> Evaluation:
        return stripe.evaluate(
            _run(model), self.judged, self._spec, self.config.inference, threshold=threshold
        )

    def _threshold(self, model: nn.Module, tiles: Tiles, progress: Progress) -> Threshold:
        """By good strips of ``valid``, where there are any, else by those that were trained on.

        The latter are shown with spots that are not to be found: without, they are too easy.
        """
        held_out = [s for s in self.judged if self.judged_by == "valid" and not s.label]
        num = len(held_out) or len(self.samples)
        inference = self.config.inference

        def maps() -> Iterator[Array]:
            for i in range(num):
                rng = np.random.default_rng((self.config.train.seed, i))
                strip = planes.read(held_out[i].path) if held_out else tiles.distracted(i, rng)
                yield from stripe.defect_maps(
                    _run(model),
                    [strip],
                    self._spec,
                    tile=inference.tile,
                    overlap=inference.overlap,
                )
                progress("threshold", i + 1, num)

        return stripe.fit_threshold(maps(), inference)


def _run(model: nn.Module) -> Callable[[Array], Array]:
    """The network as ``runtime.systems.stripe`` calls it."""
    device = next(model.parameters()).device

    @torch.no_grad()
    def run(planes_BCHW: Array) -> Array:
        logits: Array = model(torch.from_numpy(planes_BCHW).to(device)).float().cpu().numpy()
        return logits

    return run


def _write(path: Path, content: BaseModel) -> None:
    files.write(path, content.model_dump_json(indent=2) + "\n")
