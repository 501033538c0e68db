from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from engineworks.runtime import datasets, images, planes
from engineworks.runtime.doubtful import Doubtful, doubt, limit_of, place_of
from engineworks.runtime.errors import UsageError
from engineworks.runtime.objects import read_objects
from engineworks.runtime.results import (
    AnomalyMap,
    Candidate,
    Classification,
    DefectMap,
    Detection,
    Detections,
    Embedding,
)
from engineworks.runtime.sinks import Item
from engineworks.runtime.sources import PICTURES, Reader
from engineworks.runtime.tensors import Array
from engineworks.runtime.usual import Usual

MAP = np.zeros((2, 2), np.float32)
VECTOR = np.zeros(2, np.float32)
RNG = np.random.default_rng(0)


def anomaly(score: float) -> AnomalyMap:
    return AnomalyMap(score, 10.0, 10.0, MAP, None)


def classified(*shares: float, **fields: Any) -> Classification:
    top = tuple((f"class {i}", share) for i, share in enumerate(shares))
    return Classification(*top[0][:1], 0, shares[0], top, VECTOR, **fields)


def defects(*scores: float) -> DefectMap:
    return DefectMap(MAP, tuple(Candidate(0, 0, score) for score in scores), 0.5)


def found(*scores: float) -> Detections:
    objects = (Detection("cup", score, (1.0, 2.0, 21.0, 28.0)) for score in scores)
    return Detections(tuple(objects), border=0.5)


def noise(level: int = 100, side: int = 32) -> Array:
    return RNG.integers(level - 20, level + 20, (side, side, 3), np.uint8)


def system(
    *, usual: Usual | None = None, reader: Reader = PICTURES, names: tuple[str, ...] = ()
) -> Any:
    reports = {} if usual is None else {"usual": usual.model_dump()}
    bundle = SimpleNamespace(manifest=SimpleNamespace(reports=reports))
    if names:  # of a system that is told what to look for
        return MagicMock(bundle=bundle, reader=reader, names=lambda: names)
    return SimpleNamespace(bundle=bundle, reader=reader)


class TestDoubt:
    @pytest.mark.parametrize(
        "result",
        [
            anomaly(9.2),
            anomaly(10.9),
            defects(0.9, 0.52),
            defects(0.46),
            found(0.9, 0.54),
            classified(0.5, 0.4),
            classified(0.9, 0.1, prediction_set=("a", "b")),
            classified(0.9, 0.1, prediction_set=()),
            classified(0.9, 0.1, is_unknown=True),
        ],
    )
    def test_is_there_near_a_border(self, result: Any) -> None:
        assert doubt(result)

    @pytest.mark.parametrize(
        "result",
        [
            anomaly(8.0),
            anomaly(12.0),
            defects(0.9, 0.2),
            found(0.9),
            found(),
            Detections((Detection("cup", 0.5, (0, 0, 1, 1)),)),
            classified(0.9, 0.1),
            classified(1.0),
            classified(0.9, 0.1, prediction_set=("a",), is_unknown=False),
            Embedding(VECTOR),
        ],
    )
    def test_is_not_there_elsewhere(self, result: Any) -> None:
        assert doubt(result) is None


@pytest.mark.parametrize(
    ("text", "size"),
    [("doubtful:7", 7), ("doubtful:500MB", 5 * 10**8), ("doubtful:2gb", 2 * 10**9)],
)
def test_a_limit_has_a_unit(text: str, size: int) -> None:
    assert limit_of(text) == size


@pytest.mark.parametrize(
    "text", ["", "doubtful", "doubtful:", "all:5MB", "doubtful:0", "doubtful:-1MB"]
)
def test_a_limit_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="keeps nothing"):
        limit_of(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "doubtful"


class TestTheFolder:
    def test_holds_doubtful_pictures_whole_and_their_results_beside_them(
        self, folder: Path
    ) -> None:
        picture = noise()
        with Doubtful(system(), folder, 10**8) as kept:
            kept.add(Item("in/a b.png"), picture, anomaly(9.5))
            kept.add(Item("in/c.png"), noise(), anomaly(2.0))
            kept.add(Item("film.mp4", index=7, time_s=0.2, camera="left"), noise(), anomaly(10.5))
        assert kept.num_kept == 2
        (good,) = folder.glob("images/good/*.png")
        (bad,) = folder.glob("images/anomalous/*.png")
        assert np.array_equal(images.read(good), picture)
        assert good.stem.endswith("a b") and bad.stem.endswith("left-7")
        record = json.loads(good.with_suffix(".json").read_text())
        assert record["source"] == "in/a b.png"
        assert record["score"] == 9.5
        assert "near the border" in record["kept"]

    def test_holds_what_is_unlike_the_calibration(self, folder: Path) -> None:
        usual = Usual.of([(90.0, 1.0), (110.0, 1.0)])
        with Doubtful(system(usual=usual), folder, 10**8) as kept:
            kept.add(Item("a.png"), noise(100), anomaly(2.0))
            kept.add(Item("b.png"), noise(200), anomaly(2.0))
            kept.add(Item("c.png"), noise(30), anomaly(2.0))
        assert sorted(path.stem[-1] for path in folder.rglob("*.png")) == ["b", "c"]

    def test_never_grows_beyond_its_limit_and_loses_the_oldest(self, folder: Path) -> None:
        def size() -> int:
            return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

        for run in range(2):
            with Doubtful(system(), folder, 30_000) as kept:
                for i in range(20):
                    kept.add(Item(f"{run}{i:02}.png"), noise(), anomaly(9.5))
                    assert size() <= 30_000
        left = sorted(path.stem[-3:] for path in folder.rglob("*.png"))
        assert left == [f"1{i:02}" for i in range(20)][-len(left) :]
        assert 3 < len(left) < 20
        assert len(list(folder.rglob("*.json"))) == len(left)

    def test_leaves_other_files_alone(self, folder: Path) -> None:
        theirs = folder / "images" / "good" / "notes.json"
        theirs.parent.mkdir(parents=True)
        theirs.write_text("{}")
        with Doubtful(system(), folder, 5_000) as kept:
            for i in range(9):
                kept.add(Item(f"{i}.png"), noise(), anomaly(9.5))
        assert theirs.exists()

    def test_is_no_place_for_what_has_no_label(self, folder: Path) -> None:
        assert place_of(Embedding(VECTOR)) is None
        with Doubtful(system(usual=Usual.of([(1.0, None)])), folder, 10**6) as kept:
            kept.add(Item("a.png"), noise(), Embedding(VECTOR))
        assert kept.num_kept == 0


class TestTheLayout:
    """What it holds is read by what trains."""

    def test_of_anomalies(self, folder: Path) -> None:
        with Doubtful(system(), folder, 10**8) as kept:
            for i in range(4):
                kept.add(Item(f"{i}.png"), noise(), anomaly(9.5))
            kept.add(Item("x.png"), noise(), anomaly(10.5))
        assert len(datasets.mvtec(folder, "train")) == 2  # every second good one
        assert {sample.defect for sample in datasets.mvtec(folder, "test")} == {"good", "anomalous"}

    def test_of_classes(self, folder: Path) -> None:
        with Doubtful(system(), folder, 10**8) as kept:
            kept.add(Item("a.png"), noise(), replace(classified(0.5, 0.4), label="red/rose"))
            kept.add(Item("b.png"), noise(), classified(0.5, 0.4))
        samples = datasets.class_folder(folder, "train").samples
        assert len(samples) == 2
        assert "class 0" in {sample.class_name for sample in samples}

    def test_of_planes(self, folder: Path) -> None:
        strip = RNG.normal(0, 1000, (16, 24, 3)).astype(np.float32)
        with Doubtful(system(reader=planes.PLANES), folder, 10**8) as kept:
            kept.add(Item("a.npy"), strip, defects(0.46))
            kept.add(Item("b.npy"), strip, defects(0.54))
        (sample,) = datasets.strips(folder, "train")
        assert np.array_equal(planes.read(sample.path), strip)
        assert [each.label for each in datasets.strips(folder, "test")] == [1]

    def test_of_boxes(self, folder: Path) -> None:
        with Doubtful(system(names=("cup",)), folder, 10**8) as kept:
            for i in range(4):
                kept.add(Item(f"{i}.png"), noise(), found(0.9, 0.54))
        read = read_objects(folder, "train")
        assert {frame.objects for frame in read.frames} == {("cup", "cup")}
        assert list(read.references) == ["cup"]
