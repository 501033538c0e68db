"""Labelled objects in both layouts: what is read, what is clipped, what is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineworks.runtime import images
from engineworks.runtime.errors import DatasetError
from engineworks.runtime.objects import Frame, object_splits, read_objects


def write_coco(
    root: Path,
    split: str = "train",
    *,
    boxes: Mapping[str, Sequence[tuple[str, Sequence[float]]]],
    size: tuple[int, int] = (40, 60),
    references: bool = True,
) -> Path:
    """A COCO folder: file -> (category, [x, y, width, height]) of each box."""
    names = sorted({name for found in boxes.values() for name, _ in found})
    listed, annotations = [], []
    for i, (file, found) in enumerate(boxes.items()):
        images.write(root / "images" / file, np.zeros((*size, 3), np.uint8))
        listed.append({"id": i, "file_name": file, "width": size[1], "height": size[0]})
        for name, box in found:
            annotations.append({"image_id": i, "category_id": names.index(name), "bbox": box})
    content: dict[str, Any] = {"images": listed, "annotations": annotations}
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(names)]
    (root / f"annotations_{split}.json").write_text(json.dumps(content))
    for name in names if references else ():
        images.write(root / "references" / name / "0.png", np.zeros((8, 8, 3), np.uint8))
    return root


def write_videos(root: Path, objects: dict[str, str]) -> Path:
    """A folder of videos: id -> object. Nothing in the videos is read."""
    listed = []
    for name, of in objects.items():
        folder = root / "samples" / name
        images.write(folder / "object_images" / "a.jpg", np.zeros((8, 8, 3), np.uint8))
        (folder / "drone_video.mp4").touch()
        boxes = [{"frame": i, "x1": 1, "y1": 2, "x2": 9, "y2": 8} for i in (3, 1)]
        listed.append({"video_id": name, "object": of, "annotations": [{"bboxes": boxes}]})
    (root / "annotations.json").write_text(json.dumps(listed))
    return root


class TestACocoFolder:
    def test_gives_frames_with_their_boxes_as_corners(self, tmp_path: Path) -> None:
        root = write_coco(tmp_path, boxes={"a.png": [("cup", [5, 6, 10, 20])], "b.png": []})
        first, second = read_objects(root, "train").frames
        assert first.frame == Frame(root / "images" / "a.png")
        assert first.objects == ("cup",) and first.video is None
        assert first.boxes_N4.dtype == np.float32
        assert first.boxes_N4.tolist() == [[5, 6, 15, 26]]
        assert second.objects == () and second.boxes_N4.shape == (0, 4)

    def test_has_the_splits_that_are_there(self, tmp_path: Path) -> None:
        for split in ("test", "train"):
            write_coco(tmp_path, split, boxes={"a.png": [("cup", [5, 6, 10, 20])]})
        assert object_splits(tmp_path) == ("train", "test")

    @given(
        corner=st.tuples(st.floats(-2, 50), st.floats(-1, 30)),
        sides=st.tuples(st.floats(5, 12), st.floats(5, 11)),
    )
    @settings(max_examples=60, deadline=None)
    def test_has_no_box_outside_of_its_frames(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        corner: tuple[float, float],
        sides: tuple[float, float],
    ) -> None:
        root = tmp_path_factory.mktemp("coco")
        write_coco(root, boxes={"a.png": [("cup", [*corner, *sides])]})
        (frame,) = read_objects(root, "train").frames
        x1, y1 = np.clip(corner, 0, (60, 40))
        x2, y2 = np.clip(np.add(corner, sides), 0, (60, 40))
        # float32
        np.testing.assert_allclose(frame.boxes_N4, [[x1, y1, x2, y2]], atol=1e-5)

    def test_takes_references_from_their_folder(self, tmp_path: Path) -> None:
        root = write_coco(tmp_path, boxes={"a.png": [("cup", [5, 6, 10, 20])]})
        found = read_objects(root, "train")
        (reference,) = found.references["cup"]
        assert reference.box is None
        assert reference.frame.path == root / "references" / "cup" / "0.png"
        assert found.files() == sorted([root / "images" / "a.png", reference.frame.path])

    def test_without_such_a_folder_cuts_them_out_of_frames_that_it_then_leaves_out(
        self, tmp_path: Path
    ) -> None:
        boxes = {f"{i}.png": [("cup", [i, 6, 20, 20])] for i in range(8)}
        found = read_objects(write_coco(tmp_path, boxes=boxes, references=False), "train")
        used = {each.frame for each in found.references["cup"]}
        assert len(used) == 4 and len(found.frames) == 4
        assert used.isdisjoint(each.frame for each in found.frames)
        assert {each.box[2] - each.box[0] for each in found.references["cup"] if each.box} == {20}

    def test_cuts_them_out_of_training_frames_where_these_show_the_object(
        self, tmp_path: Path
    ) -> None:
        known = {f"{i}.png": [("cup", [i, 6, 20, 20])] for i in range(8)}
        write_coco(tmp_path, boxes=known, references=False)
        boxes = {
            f"test-{i}.png": [("cup", [i, 6, 20, 20]), ("pen", [40, 6, 20, 20])] for i in (3, 5)
        }
        found = read_objects(write_coco(tmp_path, "test", boxes=boxes, references=False), "test")
        assert len(found.references["cup"]) == 4
        assert all("test" not in each.frame.path.name for each in found.references["cup"])
        # training shows no pen: one of the two frames is used up for it
        assert len(found.references["pen"]) == 1
        assert found.references["pen"][0].frame not in [each.frame for each in found.frames]
        assert len(found.frames) == 1

    def test_takes_the_boxes_that_a_file_names_and_does_not_search_their_frames(
        self, tmp_path: Path
    ) -> None:
        boxes = {f"{i}.png": [("cup", [i, 6, 20, 20])] for i in range(4)}
        root = write_coco(tmp_path, "test", boxes=boxes, references=False)
        path = root / "annotations_test.json"
        content = json.loads(path.read_text())
        for number, each in enumerate(content["annotations"]):
            each["id"] = 70 + number
        path.write_text(json.dumps(content))
        (root / "references_test.json").write_text(json.dumps({"0": [73, 71]}))

        found = read_objects(root, "test")

        assert [each.frame.path.name for each in found.references["cup"]] == ["3.png", "1.png"]
        assert [each.box for each in found.references["cup"]] == [(3, 6, 23, 26), (1, 6, 21, 26)]
        assert [each.frame.path.name for each in found.frames] == ["0.png", "2.png"]

    @pytest.mark.parametrize("named", [{"0": [99]}, {"5": [70]}, {"0": []}])
    def test_refuses_a_file_that_names_other_boxes(
        self, named: dict[str, list[int]], tmp_path: Path
    ) -> None:
        boxes = {"a.png": [("cup", [1, 6, 20, 20])], "b.png": [("cup", [1, 6, 20, 20])]}
        root = write_coco(tmp_path, "test", boxes=boxes, references=False)
        (root / "references_test.json").write_text(json.dumps(named))
        with pytest.raises(DatasetError, match=r"references_test\.json"):
            read_objects(root, "test")

    def test_whose_frames_are_all_used_up_as_references_is_refused(self, tmp_path: Path) -> None:
        root = write_coco(tmp_path, boxes={"a.png": [("cup", [5, 6, 20, 20])]}, references=False)
        with pytest.raises(DatasetError, match="no frames") as caught:
            read_objects(root, "train")
        assert "references/" in (caught.value.fix or "")

    def test_leaves_crowds_out(self, tmp_path: Path) -> None:
        root = write_coco(tmp_path, boxes={"a.png": [("cup", [5, 6, 10, 20])] * 2})
        path = root / "annotations_train.json"
        content = json.loads(path.read_text())
        content["annotations"][1]["iscrowd"] = 1
        path.write_text(json.dumps(content))
        assert len(read_objects(root, "train").frames[0].boxes_N4) == 1

    def test_cuts_none_out_that_is_too_small_to_tell_anything(self, tmp_path: Path) -> None:
        boxes = {f"{i}.png": [("cup", [i, 6, 5, 20])] for i in range(3)}
        root = write_coco(tmp_path, boxes=boxes, references=False)
        with pytest.raises(DatasetError, match="no box of 'cup'") as caught:
            read_objects(root, "train")
        assert "references/cup/" in (caught.value.fix or "")


class TestHeldOutObjects:
    boxes = {  # noqa: RUF012
        "a.png": [("cup", [0, 0, 20, 20])],
        "b.png": [("cup", [0, 0, 20, 20]), ("pen", [30, 10, 20, 20])],
        "c.png": [("pen", [0, 0, 20, 20])],
        "d.png": [("pen", [0, 0, 20, 20])],
        "e.png": [("cup", [0, 0, 20, 20])],
    }

    def test_are_on_no_frame_of_the_training(self, tmp_path: Path) -> None:
        root = write_coco(tmp_path, boxes=self.boxes)
        found = read_objects(root, "train", hold_out=["pen"])
        assert {name for each in found.frames for name in each.objects} == {"cup"}
        assert set(found.references) == {"cup"} and len(found.frames) == 2

    def test_are_all_that_the_test_looks_for(self, tmp_path: Path) -> None:
        write_coco(tmp_path, boxes=self.boxes, references=False)
        others = {f"test-{file}": found for file, found in self.boxes.items()}
        root = write_coco(tmp_path, "test", boxes=others, references=False)
        found = read_objects(root, "test", hold_out=["pen"])
        assert set(found.references) == {"pen"}
        assert len(found.frames) == 5

    def test_that_are_unknown_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="no category 'fork'"):
            read_objects(write_coco(tmp_path, boxes=self.boxes), "train", hold_out=["fork"])


class TestVideos:
    def test_give_the_frames_that_have_boxes_in_order(self, tmp_path: Path) -> None:
        root = write_videos(tmp_path, {"v0": "cup", "v1": "pen"})
        found = read_objects(root, "train", hold_out=["pen"])
        video = root / "samples" / "v0" / "drone_video.mp4"
        assert [each.frame for each in found.frames] == [Frame(video, 1), Frame(video, 3)]
        assert {each.video for each in found.frames} == {"v0"}
        assert found.frames[0].boxes_N4.tolist() == [[1, 2, 9, 8]]

    @given(seed=st.integers(0, 2**32))
    @settings(max_examples=20, deadline=None)
    def test_of_one_object_are_all_on_one_side(
        self, tmp_path_factory: pytest.TempPathFactory, seed: int
    ) -> None:
        root = tmp_path_factory.mktemp("videos")
        write_videos(root, {f"v{i}": f"object {i // 2}" for i in range(24)})
        train, test = (read_objects(root, split, seed=seed) for split in ("train", "test"))
        assert len(train.references) == 11 and len(test.references) == 1
        assert train.references.keys().isdisjoint(test.references)
        (name,) = test.references
        assert {each.video for each in test.frames} == {
            f"v{2 * int(name.split()[1]) + i}" for i in (0, 1)
        }

    def test_share_the_references_of_their_object(self, tmp_path: Path) -> None:
        root = write_videos(tmp_path, {"v0": "cup", "v1": "cup", "v2": "pen"})
        (root / "samples" / "v0" / "object_images" / "a.jpg").unlink()
        found = read_objects(root, "train", hold_out=["pen"])
        (reference,) = found.references["cup"]
        assert "v1" in reference.frame.path.parts
        assert {each.video for each in found.frames} == {"v0", "v1"}

    def test_have_no_validation_of_their_own(self, tmp_path: Path) -> None:
        assert object_splits(write_videos(tmp_path, {"v0": "cup"})) == ("train", "test")

    def test_need_exactly_one_video_in_a_folder(self, tmp_path: Path) -> None:
        root = write_videos(tmp_path, {"v0": "cup"})
        (root / "samples" / "v0" / "b.avi").touch()
        with pytest.raises(DatasetError, match="holds 2 videos"):
            read_objects(root, "test")


class TestWhatDoesNotFit:
    def test_a_folder_of_neither_layout_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=r"no annotations_test\.json"):
            read_objects(tmp_path, "test")

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"images": [{"id": 1}]}'])
    def test_a_damaged_file_is_named(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "annotations_train.json").write_text(content)
        with pytest.raises(DatasetError, match=r"annotations_train\.json"):
            read_objects(tmp_path, "train")

    def test_a_missing_picture_is_named(self, tmp_path: Path) -> None:
        root = write_coco(tmp_path, boxes={"a.png": [("cup", [5, 6, 10, 20])]})
        (root / "images" / "a.png").unlink()
        with pytest.raises(DatasetError, match=r"not there: 1 \(a\.png\)"):
            read_objects(root, "train")

    def test_an_object_without_a_reference_is_named(self, tmp_path: Path) -> None:
        root = write_coco(tmp_path, boxes={"a.png": [("cup", [5, 6, 10, 20])]})
        (root / "references" / "cup" / "0.png").unlink()
        with pytest.raises(DatasetError, match="no reference of 'cup'"):
            read_objects(root, "train")

    @pytest.mark.parametrize("what", ["category", "image"])
    def test_a_box_of_what_is_not_listed_is_refused(self, tmp_path: Path, what: str) -> None:
        root = write_coco(tmp_path, boxes={"a.png": [("cup", [5, 6, 10, 20])]})
        path = root / "annotations_train.json"
        path.write_text(path.read_text().replace(f'"{what}_id": 0', f'"{what}_id": 7'))
        with pytest.raises(DatasetError, match=f"{what} 7"):
            read_objects(root, "train")


def edit(root: Path, change: Any, split: str = "train") -> Path:
    path = root / f"annotations_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return root


def turn(path: Path, orientation: int) -> None:
    """Store a picture as a JPEG that a camera has turned."""
    data = path.read_bytes()
    entry = struct.pack(">HHHIHH", 1, 0x112, 3, 1, orientation, 0)
    block = b"Exif\0\0MM\0*" + struct.pack(">I", 8) + entry + struct.pack(">I", 0)
    path.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:])


class TestLabelsThatContradict:
    boxes = {  # noqa: RUF012
        "a.jpg": [("cup", [5, 6, 10, 20])],
        "b.jpg": [("pen", [15, 6, 10, 20])],
    }

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda c: c["images"][1].update(id=0), r"id of another: 1 \(b\.jpg\)"),
            (lambda c: c["images"][1].update(file_name="a.jpg"), r"listed twice: 1 \(a\.jpg\)"),
            (lambda c: c["categories"][1].update(id=0), r"categories with the id of another"),
            (lambda c: c["annotations"][0].update(bbox=[15, 26, -10, -20]), r"negative sides: 1"),
            (lambda c: c["annotations"][0].update(bbox=[0.1, 0.2, 0.3, 0.4]), r"single pixel: 1"),
            (lambda c: c["annotations"][0].update(bbox=[70, 6, 10, 20]), r"outside of their pic"),
            (lambda c: c["annotations"][0].update(bbox=[5, 6, 15, 46]), r"stick far out"),
            (lambda c: c["annotations"][0].update(bbox=[5, 6, float("nan"), 9]), r"bbox"),
            (lambda c: c["images"][0].update(width=30), r"a\.jpg: 60 x 40, not 30 x 40"),
            (lambda c: c["images"][0].update(width=0), r"width"),
            (lambda c: c["images"][0].update(file_name="../a.jpg"), r"outside of images/"),
            (lambda c: c["images"][0].update(file_name="a\0.jpg"), r"not there"),
            (lambda c: c["images"][0].update(file_name="a" * 5000), r"not there"),
            (lambda c: c.update(annotations=[]), r"no box for 'train'"),
        ],
    )
    def test_are_refused_with_the_way_out(self, tmp_path: Path, change: Any, reason: str) -> None:
        root = edit(write_coco(tmp_path, boxes=self.boxes), change)
        with pytest.raises(DatasetError, match=reason) as caught:
            read_objects(root, "train")
        assert caught.value.fix

    def test_are_counted_and_told_at_once(self, tmp_path: Path) -> None:
        def change(content: Any) -> None:
            for each in content["annotations"]:
                each["bbox"] = [30, 30, -5, -5]
            content["images"][0]["height"] = 10

        with pytest.raises(DatasetError, match=r"negative sides: 2.*; .*another size.*: 1"):
            read_objects(edit(write_coco(tmp_path, boxes=self.boxes), change), "train")

    def test_a_turned_photograph_must_be_labelled_upright(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        root = write_coco(tmp_path, boxes=self.boxes)
        turn(root / "images" / "a.jpg", 6)
        with pytest.raises(DatasetError, match=r"EXIF turns.*a\.jpg: 40 x 60, not 60 x 40"):
            read_objects(root, "train")
        edit(root, lambda content: content["images"][0].update(width=40, height=60))
        assert len(read_objects(root, "train").frames) == 2
        assert "EXIF turns, whose boxes must be of the upright picture: 1" in caplog.text

    def test_what_is_done_with_boxes_is_said(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        boxes = {"a.jpg": [("cup", [5, 6, 10, 20])] * 20}
        boxes["a.jpg"] += [("cup", [40, 6, 22, 20]), ("cup", [5, 6, 1, 1.5]), ("cup", [9, 9, 0, 4])]
        (frame,) = read_objects(write_coco(tmp_path, boxes=boxes), "train").frames
        assert len(frame.boxes_N4) == 21
        assert "cut at the border of their picture: 1 (image 0: [40, 6, 22, 20])" in caplog.text
        assert "less than 2 square pixels left out: 2" in caplog.text

    def test_of_videos_are_refused(self, tmp_path: Path) -> None:
        root = write_videos(tmp_path, {"v0": "cup", "v1": "pen"})
        path = root / "annotations.json"
        for wrong, reason in (
            ('"x1": 1, "y1": 2, "x2": 9', '"x1": 12, "y1": 2, "x2": 9'),
            ('"video_id": "v1"', '"video_id": "v0"'),
            ('"video_id": "v1"', '"video_id": "../samples/v1"'),
            ('"frame": 3', '"frame": -3'),
        ):
            text = path.read_text()
            path.write_text(text.replace(wrong, reason))
            with pytest.raises(DatasetError, match=r"annotations\.json"):
                read_objects(root, "train", hold_out=["pen"])
            path.write_text(text)

    def test_held_out_objects_that_a_split_never_shows_leave_nothing_to_find(
        self, tmp_path: Path
    ) -> None:
        write_coco(tmp_path, boxes=self.boxes)
        root = write_coco(tmp_path, "val", boxes={"c.jpg": self.boxes["a.jpg"]})
        edit(root, lambda c: c["categories"].append({"id": 9, "name": "pen"}), "val")
        with pytest.raises(DatasetError, match="no box for 'val' of an object that is to be found"):
            read_objects(root, "val", hold_out=["pen"])


def test_references_of_editors_are_no_pictures_of_objects(tmp_path: Path) -> None:
    root = write_coco(tmp_path, boxes={"a.png": [("cup", [5, 6, 10, 20])]})
    (root / "references" / "cup" / "._0.png").write_bytes(b"\0\5\26\7")
    (reference,) = read_objects(root, "train").references["cup"]
    assert reference.frame.path.name == "0.png"


def test_pictures_in_linked_folders_are_there(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "set", boxes={"x/a.png": [("cup", [5, 6, 10, 20])]})
    (root / "images" / "x").rename(tmp_path / "elsewhere")
    (root / "images" / "x").symlink_to(tmp_path / "elsewhere")
    assert len(read_objects(root, "train").frames) == 1


def test_a_list_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    root = write_coco(tmp_path, boxes={"a.png": [("cup", [5, 6, 10, 20])]})
    path = root / "annotations_train.json"
    text = path.read_text()
    path.write_text(text.replace('"annotations"', '"annotations": [], "annotations"'))
    with pytest.raises(DatasetError, match="'annotations' more than once"):
        read_objects(root, "train")
    path.write_text("\ufeff" + text)
    assert len(read_objects(root, "train").frames) == 1


def test_names_of_pictures_may_begin_with_their_folder(tmp_path: Path) -> None:
    root = write_coco(tmp_path, boxes={"a.png": [("cup", [5, 6, 10, 20])]})
    edit(root, lambda content: content["images"][0].update(file_name="images/a.png"))
    assert read_objects(root, "train").frames[0].frame.path == root / "images" / "a.png"


def test_categories_of_one_name_are_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    boxes = {"a.png": [("cup", [5, 6, 10, 20])], "b.png": [("pen", [5, 6, 10, 20])]}
    root = edit(write_coco(tmp_path, boxes=boxes), lambda c: c["categories"][1].update(name="cup"))
    assert set(read_objects(root, "train").references) == {"cup"}
    assert "categories of one name, taken for one: 1 (cup)" in caplog.text
