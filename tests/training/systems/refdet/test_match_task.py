"""What matching fits to pictures before anything is learned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from engineworks.runtime import images
from engineworks.runtime.preprocess import PreprocessSpec, apply
from engineworks.runtime.testing import write_scenes
from engineworks.training.backbones import read_weights
from engineworks.training.config import load_config
from engineworks.training.systems.refdet.config import TaskConfig
from engineworks.training.systems.refdet.match_task import Task, spread
from engineworks.training.train import train

pytestmark = pytest.mark.train

SETTINGS = [
    "preprocess.size=[64, 96]",
    "reference_preprocess.size=[64, 64]",
    "encoder.name=test_resnet",
    "encoder.weights=none",
    "encoder.stages=[1, 2]",
    "match.cells=3",
    "match.scales=[1]",
    "match.num_sizes=3",
    "match.follow=null",
    "train.device=cpu",
]
STRIDE = 16


def config(ground: int) -> TaskConfig:
    kind = f"match.kind={{stage: 3, factor: 4.0, ground: {ground}}}"
    found = load_config("refdet", Path("match"), [*SETTINGS, kind])
    assert isinstance(found, TaskConfig)
    return found


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("drawn"))


def is_free(y: float, x: float, boxes: Sequence[Sequence[float]]) -> bool:
    return not any(left <= x < left + w and top <= y < top + h for left, top, w, h in boxes)


class TestTheGround:
    def test_is_the_mean_of_places_beside_every_box(self, drawn: Path, tmp_path: Path) -> None:
        chosen = config(1000)
        task = Task(chosen, drawn, tmp_path)
        labels = json.loads((drawn / "annotations_train.json").read_text())
        assert isinstance(chosen.preprocess, PreprocessSpec)
        said = []
        for picture in labels["images"]:
            image = images.read(drawn / "images" / picture["file_name"])
            assert image.shape == (64, 96, 3)  # nothing is scaled
            pixels = torch.from_numpy(apply(chosen.preprocess, [image]))
            with torch.no_grad():
                deep_KHW = task.matcher.net(pixels)[-1][0].double().numpy()
            boxes = [a["bbox"] for a in labels["annotations"] if a["image_id"] == picture["id"]]
            said += [
                deep_KHW[:, i, j] / np.linalg.norm(deep_KHW[:, i, j])
                for i, j in product(range(64 // STRIDE), range(96 // STRIDE))
                if is_free(STRIDE * (i + 0.5), STRIDE * (j + 0.5), boxes)
            ]
        assert task.matcher.ground_K is not None
        np.testing.assert_allclose(task.matcher.ground_K.numpy(), np.mean(said, 0), atol=1e-5)

    def test_is_kept_with_the_weights(self, drawn: Path, tmp_path: Path) -> None:
        run = train(config(5), drawn, tmp_path / "run")
        assert read_weights(run.weights())["ground_K"].abs().sum() > 0

    def test_is_nothing_where_no_pictures_are_there_to_train_on(
        self, drawn: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "data").mkdir()
        for name in ("images", "references", "annotations_test.json"):
            (tmp_path / "data" / name).symlink_to(drawn / name)
        task = Task(config(5), tmp_path / "data", tmp_path)
        assert task.matcher.ground_K is not None
        assert not task.matcher.ground_K.any()

    def test_is_not_asked_for_unless_the_configuration_does(
        self, drawn: Path, tmp_path: Path
    ) -> None:
        task = Task(config(0), drawn, tmp_path)
        assert "ground_K" not in task.matcher.state_dict()


def test_frames_are_spread_evenly() -> None:
    frames = list(range(10))
    assert spread(frames, 4) == [0, 2, 5, 7]  # type: ignore[arg-type, comparison-overlap]
    assert spread(frames, 40) == frames  # type: ignore[arg-type, comparison-overlap]
