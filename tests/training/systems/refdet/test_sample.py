"""The drawn toys: unseen ones are unseen, boxes fit, and the seed decides everything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engineworks.runtime.errors import RunError
from engineworks.runtime.frames import Frames
from engineworks.runtime.objects import object_splits, read_objects
from engineworks.runtime.video import VideoFile
from engineworks.training.systems.refdet.sample import choose, reference, sample, scene

FEW = {"size": 64, "num_toys": 6, "num_unseen": 2, "num_train": 5, "num_val": 2, "num_test": 3}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toys") / "data"
    sample(out, seed=3, **FEW)
    return out


def test_counts_what_it_draws(tmp_path: Path) -> None:
    counts = sample(tmp_path / "data", **FEW)
    assert counts["images/train"] == 5 and counts["images/test"] == 3
    assert counts["references"] == 4 * (6 + 2 + 2)
    assert len(list((tmp_path / "data" / "references").glob("*/*.jpg"))) == counts["references"]
    with VideoFile(tmp_path / "data" / "video.mp4") as video:
        assert len(video) == counts["video.mp4"]


def test_no_toy_is_in_two_splits(drawn: Path) -> None:
    assert object_splits(drawn) == ("train", "val", "test")
    names = [set(read_objects(drawn, split).references) for split in ("train", "val", "test")]
    assert not names[0] & names[1] and not names[0] & names[2] and not names[1] & names[2]


def test_any_two_toys_differ_in_two_of_four() -> None:
    toys = choose(np.random.default_rng(0), 64)
    assert len(set(toys)) == 64
    assert max(a.shares(b) for i, a in enumerate(toys) for b in toys[:i]) == 2


@pytest.mark.parametrize("seed", range(6))
def test_a_box_is_where_the_toy_is(seed: int) -> None:
    toy = choose(np.random.default_rng(seed), 1)[0]
    third = next(c for c in ("white", "black", "red") if c not in (toy.first, toy.second))
    other = replace(toy, pattern="plain", first=third)
    # scenes that differ in what the toy looks like alone: the randomness is the same
    (picture, boxes_N4, shown), (repainted, _, _) = (
        scene(np.random.default_rng(seed), [each], 96) for each in (toy, other)
    )
    assert picture.shape == (96, 96, 3) and picture.dtype == np.uint8
    assert boxes_N4.dtype == np.float32 and len(boxes_N4) == len(shown) == 1
    rows, columns = np.nonzero((picture != repainted).any(axis=-1))
    changed = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    # boxes go by pixels of the drawing that are half covered, twice as fine as the picture's
    assert boxes_N4[0] == pytest.approx(changed, abs=1.5)


def test_the_same_seed_draws_the_same(tmp_path: Path, drawn: Path) -> None:
    sample(tmp_path / "again", seed=3, **FEW)
    for path in sorted(drawn.rglob("*.jpg")) + sorted(drawn.rglob("*.json")):
        assert (tmp_path / "again" / path.relative_to(drawn)).read_bytes() == path.read_bytes()


def test_more_frames_leave_the_first_ones_as_they_are(tmp_path: Path, drawn: Path) -> None:
    sample(tmp_path / "more", seed=3, **(FEW | {"num_train": 7}))
    first = "images/train/0004.jpg"
    assert (tmp_path / "more" / first).read_bytes() == (drawn / first).read_bytes()


def test_more_toys_to_learn_from_leave_those_to_be_found_as_they_are(
    tmp_path: Path, drawn: Path
) -> None:
    sample(tmp_path / "more", seed=3, **(FEW | {"num_toys": 9}))
    for folder in ("images/val", "images/test", "wanted"):
        for path in sorted((drawn / folder).rglob("*.jpg")):
            assert (tmp_path / "more" / path.relative_to(drawn)).read_bytes() == path.read_bytes()
    for path in drawn.rglob("annotations_test.json"):
        assert (tmp_path / "more" / path.relative_to(drawn)).read_bytes() == path.read_bytes()


def test_two_pictures_of_a_toy_are_not_the_same(drawn: Path) -> None:
    (toy,) = choose(np.random.default_rng(0), 1)
    a, b = (reference(np.random.default_rng(i), toy, 32) for i in (0, 1))
    assert a.shape == (32, 32, 3) and not np.array_equal(a, b)


def test_the_ride_has_its_boxes_and_leaves_the_frame(drawn: Path) -> None:
    found = read_objects(drawn / "ride", "test")
    assert len(found.references) == 1 and {each.video for each in found.frames} == {"ride"}
    with VideoFile(drawn / "video.mp4") as video:
        assert 20 < len(found.frames) < len(video)
    (name,) = found.references
    wanted = {path.name for path in (drawn / "wanted").iterdir()}
    assert name in wanted and wanted == set(read_objects(drawn, "test").references)
    assert Frames(0).read(found.frames[0].frame).shape == (64, 64, 3)


def test_refuses_a_folder_with_something_in_it(drawn: Path) -> None:
    with pytest.raises(RunError, match="not empty"):
        sample(drawn)
