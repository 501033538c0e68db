from __future__ import annotations

import itertools
import subprocess
import sys
from importlib import resources
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import yaml

from engineworks.runtime import datasets, images
from engineworks.runtime.errors import RunError
from engineworks.runtime.preprocess import PreprocessSpec
from engineworks.training.config import keys, validate
from engineworks.training.systems.paco.config import TaskConfig, ViewsConfig
from engineworks.training.systems.paco.data import Views
from engineworks.training.systems.paco.sample import MARKS, draw, sample


class TestADrawnDataSet:
    def test_has_a_folder_per_split_and_class(self, tmp_path: Path) -> None:
        out = tmp_path / "drawn"
        counts = sample(out, size=48, num_train=2, num_val=1, num_test=1)
        assert counts == {
            **{f"train/{name}": 2 for name in MARKS},
            **{f"val/{name}": 1 for name in MARKS},
            **{f"test/{name}": 1 for name in MARKS},
            "video.mp4": 90,
        }
        for folder, num in counts.items():
            if folder != "video.mp4":
                files = sorted((out / folder).iterdir())
                assert [file.name for file in files] == [f"{i:03d}.jpg" for i in range(num)]
                assert {images.read(file).shape for file in files} == {(48, 48, 3)}
        contents = [file.read_bytes() for file in out.rglob("*.jpg")]
        assert len(set(contents)) == len(contents) == 24  # no picture occurs twice

    def test_is_read_as_folders_of_classes(self, tmp_path: Path) -> None:
        sample(tmp_path / "drawn", size=32, num_train=2, num_val=1, num_test=1)
        found = datasets.class_folder(tmp_path / "drawn", "train")
        assert found.labels == tuple(sorted(MARKS))
        views = Views(
            found.samples, PreprocessSpec(size=(24, 24)), ViewsConfig(), read=datasets.read
        )
        labels = [views.get(i, np.random.default_rng(i))["label"] for i in range(len(views))]
        assert labels == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]

    def test_is_the_same_for_the_same_seed_and_when_it_grows(self, tmp_path: Path) -> None:
        for folder, seed, num in (("a", 1, 1), ("b", 1, 2), ("c", 2, 1)):
            sample(tmp_path / folder, seed=seed, size=32, num_train=num, num_val=0, num_test=0)
        pictures = [(tmp_path / f / "train/ring/000.jpg").read_bytes() for f in "abc"]
        assert pictures[0] == pictures[1] != pictures[2]

    def test_has_a_video_that_can_be_read(self, tmp_path: Path) -> None:
        sample(tmp_path / "drawn", size=48, num_train=0, num_val=0, num_test=0)
        with av.open(str(tmp_path / "drawn/video.mp4")) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == 90
        assert frames[0].shape == (48, 48, 3)

    def test_is_not_drawn_over_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(RunError, match="not empty"):
            sample(tmp_path)

    def test_is_drawn_without_torch(self) -> None:
        code = "import sys, training.systems.paco.sample; assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)


class TestAClass:
    @pytest.mark.parametrize("seed", range(3))
    def test_differs_from_the_others_in_the_eyes_alone(self, seed: int) -> None:
        drawn = {name: draw(np.random.default_rng(seed), 96, name) for name in MARKS}
        for one, other in itertools.combinations(MARKS, 2):
            (picture, mask), (another, same_mask) = drawn[one], drawn[other]
            assert (mask == same_mask).all()
            assert set(np.unique(mask)) == {0, 255}
            assert 0.01 < (mask > 0).mean() < 0.12  # a small part of the picture
            assert cv2.connectedComponents(mask)[0] == 3  # the ground and two eyes
            change = np.abs(picture.astype(int) - another).max(axis=2)
            assert change[mask == 0].max() == 0
            # somewhere one is dark and the other pale: more than a trace of the mark
            assert (change > 40).sum() > 20

    def test_has_a_mark_of_the_same_area_as_every_other(self) -> None:
        darkness = {}
        for name in MARKS:
            picture, mask = draw(np.random.default_rng(1), 192, name)
            inside = cv2.erode(mask, np.ones((3, 3), np.uint8)) > 0  # without the rim
            grey = picture.mean(axis=2)[inside]
            darkness[name] = (grey.max() - grey).mean()
        values = np.array(list(darkness.values()))
        # thin outlines are partly smoothed away, and rounded to a sixteenth of a pixel
        assert values.max() / values.min() < 1.1, darkness

    def test_can_be_told_by_the_shape_of_its_mark(self) -> None:
        """In the same eye, no two marks are nearly alike; bar and pair share two thirds."""
        drawn = [draw(np.random.default_rng(5), 192, name) for name in MARKS]
        inside = cv2.erode(drawn[0][1], np.ones((5, 5), np.uint8)) > 0  # without the rim
        dark = [picture.mean(axis=2)[inside] < 110 for picture, _ in drawn]
        for one, other in itertools.combinations(dark, 2):
            assert (one & other).sum() / (one | other).sum() < 0.75


class TestTheDefaults:
    def tree(self) -> dict[str, object]:
        text = (
            resources.files("engineworks.training.systems.paco")
            .joinpath("default.yaml")
            .read_text()
        )
        loaded = yaml.safe_load(text)
        assert isinstance(loaded, dict)
        return loaded

    def test_are_valid(self) -> None:
        config = validate(TaskConfig, self.tree())
        assert config.backbone.stages is None
        assert config.train.optimizer.clip_norm == 5

    def test_name_every_setting_of_views_parts_and_loss(self) -> None:
        tree = self.tree()

        def named(branch: dict[str, object], prefix: str = "") -> set[str]:
            found: set[str] = set()
            for key, value in branch.items():
                inner = isinstance(value, dict) and key != "args"
                found |= named(value, f"{prefix}{key}.") if inner else {prefix + key}  # type: ignore[arg-type]
            return found

        wanted = {
            key for key in keys(TaskConfig) if key.split(".")[0] in ("views", "parts", "loss")
        }
        assert wanted <= named(tree)
        assert named(tree) <= set(keys(TaskConfig))

    def test_are_those_of_the_classes(self) -> None:
        config = validate(TaskConfig, self.tree())
        short = validate(
            TaskConfig,
            {key: value for key, value in self.tree().items() if key in ("backbone", "preprocess")},
        )
        assert config.parts == short.parts
        assert config.loss == short.loss
        # 4/3 is written with four digits
        assert config.views.crop_ratio == pytest.approx(short.views.crop_ratio, abs=1e-4)
        assert config.views.model_copy(update={"crop_ratio": short.views.crop_ratio}) == short.views
