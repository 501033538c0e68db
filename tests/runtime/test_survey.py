"""What `check` finds: each planted fault, in every layout that can have it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from click.testing import CliRunner, Result

from engineworks import cli
from engineworks.runtime import images
from engineworks.runtime.labels import Labelled
from engineworks.runtime.survey import survey
from engineworks.runtime.systems import SYSTEMS, labelled_of
from engineworks.runtime.testing import write_flowers, write_parts, write_scenes, write_strips
from engineworks.runtime.video import VideoWriter

WRITERS: dict[str, Callable[[Path], Path]] = {
    "noising": write_parts,
    "paco": write_flowers,
    "refdet": write_scenes,
    "stripe": write_strips,
    "backbone": write_flowers,
}
LAYOUTS = pytest.mark.parametrize("system", WRITERS)
# a picture to learn from, and one of another label or split
PICTURES = {
    "noising": ("train/good/000.png", "test/scratch/000.png"),
    "paco": ("train/blue/000.png", "train/red/000.png"),
    "refdet": ("images/train_000.png", "images/test_000.png"),
    "stripe": ("train/good/000.png", "test/spot/000.png"),
}


def check(system: str, data: Path, *options: object) -> Result:
    words = ["check", system, "--data", data, *options]
    return CliRunner().invoke(cli.main, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture
def data(tmp_path: Path, system: str) -> Path:
    return WRITERS[system](tmp_path / "data")


def test_every_system_has_data_to_look_at() -> None:
    assert set(WRITERS) == set(SYSTEMS)


@LAYOUTS
class TestASoundSet:
    def test_is_told_in_a_table_and_on_a_page(
        self, system: str, data: Path, tmp_path: Path
    ) -> None:
        done = check(system, data, "--report", tmp_path / "page.html")
        assert done.exit_code == 0, done.output
        assert "train" in done.output and "test" in done.output and "64" in done.output
        assert "To be mended" not in done.output
        assert (tmp_path / "page.html").read_text().count("<figure>") >= 2

    def test_is_read_by_its_headers_alone_where_that_is_asked_for(
        self, system: str, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        labelled = labelled_of(system)(data)

        def refuse() -> Any:
            raise AssertionError("decoded")

        blind = Labelled(
            {
                split: tuple(replace(item, read=refuse) for item in items)
                for split, items in labelled.splits.items()
            }
        )
        assert [row[:4] for row in survey(blind, quick=True).rows] == [
            row[:4] for row in survey(labelled).rows
        ]


@pytest.mark.parametrize("system", PICTURES)
class TestEveryLayout:
    def test_a_picture_that_cannot_be_read_is_named(self, system: str, data: Path) -> None:
        path = data / PICTURES[system][0]
        path.write_bytes(path.read_bytes()[:60])
        done = check(system, data)
        assert done.exit_code == 1
        assert "cannot be read: 1" in done.output and path.name in done.output
        assert "cannot be read: 1" in check(system, data, "--quick").output

    def test_a_picture_with_two_labels_or_in_two_splits_is_named(
        self, system: str, data: Path
    ) -> None:
        first, second = (data / name for name in PICTURES[system])
        shutil.copy(first, second)
        done = check(system, data)
        doubtful = system == "refdet"  # its labels are boxes, and a picture may be in two splits
        assert done.exit_code == (0 if doubtful else 1), done.output
        expected = "same pictures in test and train: 1" if doubtful else "with two labels: 1"
        assert expected in done.output

    def test_what_is_left_out_is_said(self, system: str, data: Path) -> None:
        place = (data / PICTURES[system][0]).parent
        (place / "._a.png").write_bytes(b"\0\5\26\7")
        (place / "b.heic").touch()
        (data / "notes").mkdir()
        done = check(system, data)
        assert done.exit_code == 0
        for kind in ("hidden: 1 (._a.png)", ".heic: 1 (b.heic)", "notes"):
            assert kind in done.output


@pytest.mark.parametrize(("system", "defect"), [("noising", "scratch"), ("stripe", "spot")])
class TestMasks:
    def write(self, data: Path, defect: str, mask: np.ndarray[Any, Any], name: str = "") -> None:
        path = data / "ground_truth" / defect / "000_mask.png"
        path.unlink()
        images.write(path.with_name(name) if name else path, mask)

    def test_that_are_empty_are_named(self, system: str, defect: str, data: Path) -> None:
        size = images.read_mask(data / "ground_truth" / defect / "000_mask.png").shape
        self.write(data, defect, np.zeros(size, np.uint8))
        done = check(system, data, "--quick")
        assert done.exit_code == 1
        assert f"empty masks of defective pictures: 1 (test: {defect}/000_mask" in done.output

    def test_that_are_blurred_are_named(self, system: str, defect: str, data: Path) -> None:
        mask = images.read_mask(data / "ground_truth" / defect / "000_mask.png")
        self.write(data, defect, cv2.GaussianBlur(mask, (0, 0), 1.5), "000_mask.jpg")
        done = check(system, data, "--quick")
        assert done.exit_code == 1 and "blurred by their compression: 1" in done.output

    def test_that_are_missing_or_of_another_shape_are_named(
        self, system: str, defect: str, data: Path
    ) -> None:
        self.write(data, defect, np.full((20, 9), 255, np.uint8))
        (data / "ground_truth" / defect / "001_mask.png").unlink()
        done = check(system, data, "--quick")
        assert done.exit_code == 1
        assert f"without a mask: 1 ({defect}/001.png)" in done.output
        assert "of another shape than their picture: 1" in done.output

    def test_the_other_way_round_are_doubtful(self, system: str, defect: str, data: Path) -> None:
        mask = images.read_mask(data / "ground_truth" / defect / "000_mask.png")
        self.write(data, defect, 255 - mask)
        done = check(system, data, "--quick")
        assert done.exit_code == 0 and "mark most of their picture: 1" in done.output


class TestBoxes:
    def test_that_contradict_are_told_with_the_rest_of_the_table(self, tmp_path: Path) -> None:
        data = write_scenes(tmp_path)
        path = data / "annotations_train.json"
        content = json.loads(path.read_text())
        content["annotations"][0]["bbox"][2] *= -1
        content["images"][1]["width"] = 7
        content["images"][2]["file_name"] = "lost.png"
        path.write_text(json.dumps(content))
        done = check("refdet", data)
        assert done.exit_code == 1
        for kind in ("negative sides: 1", "another size", "that are not there: 1 (lost.png)"):
            assert kind in done.output
        assert "fix: " in done.output and " 4 " in done.output

    def test_of_frames_that_a_video_lacks_are_named(self, tmp_path: Path) -> None:
        for name in ("v0", "v1"):
            place = tmp_path / "samples" / name
            images.write(place / "object_images" / "a.png", np.zeros((8, 8, 3), np.uint8))
            with VideoWriter(place / "film.mp4", 10) as writer:
                for i in range(4):
                    writer.write(np.full((32, 48, 3), 40 * i, np.uint8), i / 10)
        boxes = [
            {"frame": 2, "x1": 1, "y1": 2, "x2": 9, "y2": 8},
            {"frame": 7, "x1": 1, "y1": 2, "x2": 9, "y2": 8},
            {"frame": 1, "x1": 1, "y1": 2, "x2": 99, "y2": 8},
        ]
        listed = [{"video_id": n, "annotations": [{"bboxes": boxes}]} for n in ("v0", "v1")]
        (tmp_path / "annotations.json").write_text(json.dumps(listed))
        done = check("refdet", tmp_path)
        assert done.exit_code == 1
        assert "frames that a video does not have: 2" in done.output
        assert "outside of their picture: 2" in done.output


def test_classes_that_a_split_does_not_show_are_said(tmp_path: Path) -> None:
    data = write_flowers(tmp_path)
    shutil.rmtree(data / "test" / "red")
    done = check("paco", data, "--quick")
    assert done.exit_code == 0 and "classes that test does not show: 1 (red)" in done.output


def test_a_test_split_of_one_kind_is_said(tmp_path: Path) -> None:
    data = write_parts(tmp_path)
    shutil.rmtree(data / "test" / "scratch")
    assert "splits without a defect: 1 (test)" in check("noising", data, "--quick").output


def test_an_unknown_system_is_a_usage_error(tmp_path: Path) -> None:
    assert check("nothing", tmp_path).exit_code == 2


def test_classes_that_differ_in_case_alone_are_said(tmp_path: Path) -> None:
    data = write_flowers(tmp_path)
    (data / "train" / "red").rename(data / "train" / "Blue")
    (data / "test" / "red").rename(data / "test" / "Blue")
    assert "in case or spaces alone: 1 (Blue = blue)" in check("paco", data, "--quick").output


def test_names_of_any_bytes_are_spelt_out(tmp_path: Path) -> None:
    data = write_flowers(tmp_path)
    picture = data / "train" / "red" / "000.png"
    for name in ("\x1b[31m", "\udcff"):
        shutil.copytree(picture.parent, data / "train" / name)
        (data / "train" / name / f"{name}.heic").touch()
    done = check("paco", data)
    assert done.exit_code == 1 and "with two labels" in done.output
    assert "\x1b" not in done.output and "\\x1b[31m" in done.output and "\\udcff" in done.output


def test_captures_of_different_sizes_are_named(tmp_path: Path) -> None:
    data = write_strips(tmp_path)
    for path in sorted((data / "train" / "good").iterdir()):
        for i, name in enumerate(("target", "ref1", "ref2")):
            plane = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[..., i]
            kept = plane[:-4] if path.name == "001.png" and name == "ref2" else plane
            (path.parent / name).mkdir(exist_ok=True)
            cv2.imwrite(str(path.parent / name / path.name), kept)
        path.unlink()
    done = check("stripe", data, "--quick")
    assert done.exit_code == 1
    assert "captures of different sizes: 1 (train: train/good/target/001.png)" in done.output
