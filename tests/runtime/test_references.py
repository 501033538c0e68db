from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engineworks.runtime import images
from engineworks.runtime.errors import ImageError, InputError
from engineworks.runtime.preprocess import PreprocessSpec, apply
from engineworks.runtime.references import (
    Prototypes,
    View,
    average,
    centred,
    load_references,
    mean_template,
    read_references,
    save_references,
)
from engineworks.runtime.tensors import Array
from engineworks.runtime.testing import write_scenes
from engineworks.runtime.video import VideoWriter


def picture(level: int, size: tuple[int, int] = (6, 8)) -> Array:
    return np.full((*size, 3), level, np.uint8)


def some(*names: str, width: int = 5) -> Prototypes:
    rows = np.random.default_rng(3).normal(size=(len(names), width)).astype(np.float32)
    return Prototypes(names, rows, "ab" * 32)


class TestAnAverage:
    @given(
        st.lists(st.integers(1, 5), min_size=1, max_size=4),
        st.integers(1, 5),
        st.integers(0, 2**32 - 1),
    )
    def test_is_the_mean_of_each_part_at_unit_length(
        self, widths: list[int], num: int, seed: int
    ) -> None:
        rows = np.random.default_rng(seed).normal(size=(num, sum(widths))).astype(np.float32)

        found = average(rows, widths)

        assert found.dtype == np.float32
        start = 0
        for width in widths:
            part = rows[:, start : start + width].astype(np.float64).sum(axis=0) / num
            want = part / np.sqrt(np.square(part).sum())
            # float32 holds 24 bits of a unit vector's parts
            np.testing.assert_allclose(found[start : start + width], want, atol=1e-6)
            start += width

    def test_of_one_picture_is_its_row(self) -> None:
        row = np.array([[0.6, 0.8, 0, 1, 0]], np.float32)
        np.testing.assert_allclose(average(row, (2, 3)), row[0], atol=1e-7)  # float32

    def test_of_opposite_pictures_is_nothing_and_finite(self) -> None:
        rows = np.array([[1, 0], [-1, 0]], np.float32)
        assert average(rows, (2,)).tolist() == [0, 0]


class TestAFolder:
    def test_of_folders_names_the_objects(self, tmp_path: Path) -> None:
        for name, level in (("cup/b.png", 2), ("cup/a.jpg", 1), ("Äpfel 7/x.bmp", 3)):
            images.write(tmp_path / name, picture(level))
        (tmp_path / "cup" / "notes.txt").write_text("mine")
        (tmp_path / "empty").mkdir()

        found = read_references(tmp_path)

        assert list(found) == ["cup", "Äpfel 7"]
        assert [one[0, 0, 0] for one in found["cup"]] == [1, 2]
        assert len(found["Äpfel 7"]) == 1

    def test_of_pictures_is_one_object_of_its_name(self, tmp_path: Path) -> None:
        for name in ("1.png", "2.png"):
            images.write(tmp_path / "cup" / name, picture(9))

        assert {name: len(each) for name, each in read_references(tmp_path / "cup").items()} == {
            "cup": 2
        }
        assert list(read_references(tmp_path / "cup" / "1.png")) == ["1"]

    def test_of_both_is_refused(self, tmp_path: Path) -> None:
        images.write(tmp_path / "cup" / "1.png", picture(9))
        images.write(tmp_path / "2.png", picture(9))

        with pytest.raises(InputError, match=r"beside folders of pictures \(cup\)") as caught:
            read_references(tmp_path)
        assert "folder of its name" in str(caught.value.fix)

    def test_without_pictures_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "cup").mkdir()
        (tmp_path / "notes.txt").write_text("mine")

        for path in (tmp_path, tmp_path / "cup", tmp_path / "notes.txt"):
            with pytest.raises(InputError, match="no pictures in"):
                read_references(path)
        with pytest.raises(InputError, match="nothing at"):
            read_references(tmp_path / "lost")

    def test_with_a_damaged_picture_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "cup.png").write_bytes(b"no picture")

        with pytest.raises(ImageError):
            read_references(tmp_path)


class TestABox:
    """``[NAME=]FILE[#FRAME]@X,Y,W,H``."""

    def test_in_a_picture_keeps_what_is_around_it(self, tmp_path: Path) -> None:
        images.write(tmp_path / "table.png", picture(9, (8, 8)))

        found = read_references(tmp_path / "table.png@1,2,3,4.5")

        (view,) = found["table"]
        assert isinstance(view, View)
        assert view.box == (1, 2, 4, 6.5)
        assert view.image.shape == (8, 8, 3)

    def test_has_the_name_that_it_is_given(self, tmp_path: Path) -> None:
        images.write(tmp_path / "a.png", picture(1))
        images.write(tmp_path / "cup" / "1.png", picture(2))

        found = read_references(Path(f"cup={tmp_path}/a.png@0,0,2,2"), tmp_path / "cup")

        assert [type(each) for each in found["cup"]] == [View, np.ndarray]

    def test_in_a_frame_of_a_video(self, tmp_path: Path) -> None:
        with VideoWriter(tmp_path / "film.mp4", Fraction(5)) as writer:
            for i in range(3):
                writer.write(np.full((32, 48, 3), 80 * i, np.uint8), i / 5)

        (view,) = read_references(tmp_path / "film.mp4#2@4,5,10,12")["film"]

        assert isinstance(view, View)
        assert abs(float(view.image.mean()) - 160) < 5  # the codec's loss
        with pytest.raises(InputError, match="no frame 3"):
            read_references(tmp_path / "film.mp4#3@4,5,10,12")

    def test_lies_around_what_a_mask_shows(self, tmp_path: Path) -> None:
        images.write(tmp_path / "table.png", picture(9, (8, 10)))
        mask = np.zeros((8, 10, 3), np.uint8)
        mask[2:5, 3:9] = 1
        images.write(tmp_path / "cup.png", mask)

        (view,) = read_references(Path(f"cup={tmp_path}/table.png@{tmp_path}/cup.png"))["cup"]

        assert isinstance(view, View)
        assert view.box == (3, 2, 9, 5)

    def test_of_a_mask_that_does_not_fit_is_refused(self, tmp_path: Path) -> None:
        images.write(tmp_path / "a.png", picture(9, (8, 10)))
        images.write(tmp_path / "small.png", picture(1, (4, 4)))
        images.write(tmp_path / "empty.png", np.zeros((8, 10, 3), np.uint8))
        with pytest.raises(InputError, match="4 x 4 pixels"):
            read_references(tmp_path / f"a.png@{tmp_path}/small.png")
        with pytest.raises(InputError, match="shows nothing"):
            read_references(tmp_path / f"a.png@{tmp_path}/empty.png")
        with pytest.raises(InputError, match="no mask at"):
            read_references(tmp_path / f"a.png@{tmp_path}/none.png")

    @pytest.mark.parametrize("box", ["0,0,0,4", "0,0,4,-1", "1.2.3,0,4,4"])
    def test_of_no_area_is_refused(self, box: str, tmp_path: Path) -> None:
        images.write(tmp_path / "a.png", picture(1))
        with pytest.raises(InputError, match="is no box"):
            read_references(tmp_path / f"a.png@{box}")

    def test_outside_of_the_picture_is_refused(self, tmp_path: Path) -> None:
        images.write(tmp_path / "a.png", picture(1))
        with pytest.raises(InputError, match="lies outside"):
            read_references(tmp_path / "a.png@0,0,400,2")
        with pytest.raises(InputError, match="nothing at"):
            read_references(tmp_path / "b.png@0,0,4,2")


class TestAView:
    SPEC = PreprocessSpec(size=(40, 40), resize="letterbox", pad_value=7)

    @pytest.mark.parametrize("side", [4, 10, 60])
    def test_is_centred_at_one_size(self, side: int) -> None:
        image = np.full((200, 160, 3), 50, np.uint8)
        image[70 : 70 + side // 2, 30 : 30 + side] = 200
        view = centred(self.SPEC, 0.5, View(image, (30, 70, 30 + side, 70 + side // 2)))

        assert view.box == pytest.approx((10, 15, 30, 25))
        inside = view.image[17:23, 12:28].astype(int)
        assert np.abs(inside - 200).max() <= 1
        assert np.abs(view.image[:12, 12:28].astype(int) - 50).max() <= 1

    def test_that_was_centred_stays(self, rng: np.random.Generator) -> None:
        image = rng.integers(0, 256, (60, 50, 3), np.uint8)
        once = centred(self.SPEC, 0.5, View(image, (10, 20, 31, 33)))
        again = centred(self.SPEC, 0.5, once)
        np.testing.assert_array_equal(again.image, once.image)
        assert again.box == pytest.approx(once.box)

    def test_of_a_picture_alone_is_all_of_it(self) -> None:
        view = centred(self.SPEC, 0.5, np.full((10, 20, 3), 90, np.uint8))
        assert view.box == pytest.approx((10, 15, 30, 25))
        assert view.image[20, 20].tolist() == [90, 90, 90]
        assert view.image[2, 20].tolist() == [7, 7, 7]

    def test_is_cut_with_a_little_around_it(self) -> None:
        image = np.arange(100, dtype=np.uint8).repeat(300).reshape(100, 100, 3)
        assert View(image, (20, 40, 60, 80)).cut().shape == (45, 45, 3)

    def test_stays_a_view_in_a_file(self, tmp_path: Path) -> None:
        image = np.full((200, 160, 3), 50, np.uint8)
        views = {"cup": [View(image, (30, 70, 50, 90))]}
        save_references(tmp_path / "kept.npz", views, self.SPEC, 0.5)
        (view,) = load_references(tmp_path / "kept.npz")["cup"]
        assert isinstance(view, View)
        assert view.box == pytest.approx((10, 10, 30, 30))


def test_the_mean_of_templates_is_not_brought_to_unit_length() -> None:
    rows = np.array([[1.0, 0.0, 3.0], [0.0, 1.0, 1.0]], np.float32)
    assert mean_template(rows).tolist() == [0.5, 0.5, 2.0]


class TestAFileOfPrototypes:
    def test_gives_back_what_was_saved(self, tmp_path: Path) -> None:
        kept = some("cup", "Äpfel 7")
        kept.save(tmp_path / "new" / "kept.npz")

        found = Prototypes.load(tmp_path / "new" / "kept.npz")

        assert (found.names, found.encoder) == (kept.names, kept.encoder)
        assert found.rows_NP.dtype == np.float32
        assert np.array_equal(found.rows_NP, kept.rows_NP)

    def test_is_small(self, tmp_path: Path) -> None:
        some(*"abcdefgh", width=480).save(tmp_path / "kept.npz")
        assert (tmp_path / "kept.npz").stat().st_size < 8 * 480 * 4 + 2000  # rows and a head

    def test_must_be_called_so(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="npz") as caught:
            some("cup").save(tmp_path / "kept.bin")
        assert caught.value.fix == "call it kept.npz"

    @pytest.mark.parametrize("content", [b"", b"no file of arrays", b"PK\x03\x04 cut off"])
    def test_that_is_damaged_is_refused(self, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / "kept.npz"
        path.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as prototypes"):
            Prototypes.load(path)

    def test_that_is_cut_off_anywhere_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "kept.npz"
        some("cup").save(path)
        whole = path.read_bytes()
        for length in range(0, len(whole), 37):
            path.write_bytes(whole[:length])
            with pytest.raises(InputError):
                Prototypes.load(path)

    def test_that_is_not_there_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"lost\.npz"):
            Prototypes.load(tmp_path / "lost.npz")

    @pytest.mark.parametrize(
        "arrays",
        [
            {"names": np.array(["cup"]), "rows": np.ones((1, 3), np.float32)},
            {"names": np.ones(1), "rows": np.ones((1, 3)), "encoder": np.array(["ab"])},
            {"names": np.array(["a", "b"]), "rows": np.ones((1, 3)), "encoder": np.array(["ab"])},
            {"names": np.array(["a", "a"]), "rows": np.ones((2, 3)), "encoder": np.array(["ab"])},
            {"names": np.array(["a"]), "rows": np.ones(3), "encoder": np.array(["ab"])},
            {"names": np.array(["a"]), "rows": np.ones((1, 3)), "encoder": np.array("ab")},
        ],
    )
    def test_of_something_else_is_refused(self, arrays: dict[str, Array], tmp_path: Path) -> None:
        np.savez(tmp_path / "other.npz", **arrays)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="does not hold"):
            Prototypes.load(tmp_path / "other.npz")

    def test_with_a_pickle_in_it_is_refused_and_not_opened(self, tmp_path: Path) -> None:
        rows = np.array([print], dtype=object)
        np.savez(tmp_path / "other.npz", names=np.array(["a"]), rows=rows)
        with pytest.raises(InputError, match="pickle"):
            Prototypes.load(tmp_path / "other.npz")

    def test_of_a_single_array_is_refused(self, tmp_path: Path) -> None:
        np.save(tmp_path / "other.npy", np.ones(3))
        (tmp_path / "other.npy").rename(tmp_path / "other.npz")
        with pytest.raises(InputError, match="cannot be read"):
            Prototypes.load(tmp_path / "other.npz")


class TestAFileOfReferences:
    SPEC = PreprocessSpec(size=(16, 16), resize="letterbox")

    def test_gives_the_network_what_the_pictures_would(
        self, tmp_path: Path, rng: np.random.Generator
    ) -> None:
        drawn = {
            name: [rng.integers(0, 256, size, np.uint8) for size in sizes]
            for name, sizes in (("cup", [(9, 20, 3), (40, 30, 3)]), ("b", [(16, 16, 3)]))
        }
        save_references(tmp_path / "r.npz", drawn, self.SPEC)

        found = load_references(tmp_path / "r.npz")

        assert list(found) == ["cup", "b"]
        for name, pictures in drawn.items():
            assert np.array_equal(apply(self.SPEC, found[name]), apply(self.SPEC, pictures))

    def test_that_holds_something_else_is_refused(self, tmp_path: Path) -> None:
        some("cup").save(tmp_path / "kept.npz")
        with pytest.raises(InputError, match="does not hold references"):
            load_references(tmp_path / "kept.npz")
        np.savez(tmp_path / "o.npz", names=np.array(["a"]), pictures=np.zeros((2, 3), np.uint8))
        with pytest.raises(InputError, match="pictures with their names"):
            load_references(tmp_path / "o.npz")


class TestCoco:
    def test_gives_boxes_of_each_category(self, tmp_path: Path) -> None:
        data = write_scenes(tmp_path / "data")

        found = read_references(data / "annotations_train.json")

        names = {
            each["name"]
            for each in json.loads((data / "annotations_train.json").read_text())["categories"]
        }
        assert set(found) == names
        assert all(isinstance(view, View) for views in found.values() for view in views)

    def test_takes_those_that_a_file_names(self, tmp_path: Path) -> None:
        data = write_scenes(tmp_path / "data")
        labels = json.loads((data / "annotations_train.json").read_text())
        chosen = {}
        for i, each in enumerate(labels["annotations"]):
            each["id"] = i
            chosen[str(each["category_id"])] = [i]
        (data / "annotations_train.json").write_text(json.dumps(labels))
        (data / "references_train.json").write_text(json.dumps(chosen))

        found = read_references(data / "annotations_train.json")

        assert {len(views) for views in found.values()} == {1}
        x, y, width, height = labels["annotations"][next(iter(chosen.values()))[0]]["bbox"]
        boxes = [view.box for views in found.values() for view in views if isinstance(view, View)]
        assert (x, y, x + width, y + height) in boxes

    def test_under_another_name_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "labels.json").write_text("{}")
        with pytest.raises(InputError, match="annotations_<split>"):
            read_references(tmp_path / "labels.json")
