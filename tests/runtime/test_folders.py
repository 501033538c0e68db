"""The one rule of what is data."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from engineworks.runtime import folders
from engineworks.runtime.folders import Tally


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def relative(found: list[Path], root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in found]


class TestAFolder:
    def test_gives_files_and_folders_sorted(self, tmp_path: Path) -> None:
        make(tmp_path, "b.png", "a.txt", "d/x.png", "c/y.png")
        files, inner = folders.entries(tmp_path)
        assert relative(files, tmp_path) == ["a.txt", "b.png"]
        assert relative(inner, tmp_path) == ["c", "d"]

    @pytest.mark.parametrize(
        "name", [".ipynb_checkpoints/a.png", "._a.png", ".DS_Store", "Thumbs.db", "__MACOSX/a.png"]
    )
    def test_holds_nothing_of_editors_and_operating_systems(
        self, tmp_path: Path, name: str
    ) -> None:
        left_out = Tally()
        make(tmp_path, name, "a.png")
        assert relative(folders.below(tmp_path, left_out), tmp_path) == ["a.png"]
        assert left_out.names == {"hidden": [name.split("/")[0]]}

    def test_is_read_whatever_it_is_called_itself(self, tmp_path: Path) -> None:
        root = make(tmp_path / ".cache", "a.png")
        assert folders.below(root) == [root / "a.png"]

    def test_follows_links_to_files_and_folders(self, tmp_path: Path) -> None:
        make(tmp_path, "store/b.png", "src/a/a.png")
        (tmp_path / "src" / "b").symlink_to(tmp_path / "store")
        (tmp_path / "src" / "c.png").symlink_to(tmp_path / "store" / "b.png")
        (tmp_path / "src" / "d.png").symlink_to(tmp_path / "nothing")
        left_out = Tally()
        found = folders.below(tmp_path / "src", left_out)
        assert relative(found, tmp_path / "src") == ["a/a.png", "b/b.png", "c.png"]
        assert left_out.names == {"broken link": ["d.png"]}

    def test_with_links_in_a_loop_is_read_once(self, tmp_path: Path) -> None:
        make(tmp_path, "a/1.png", "b/2.png")
        (tmp_path / "a" / "up").symlink_to(tmp_path)
        (tmp_path / "a" / "b").symlink_to(tmp_path / "b")
        (tmp_path / "b" / "a").symlink_to(tmp_path / "a")
        left_out = Tally()
        found = folders.below(tmp_path, left_out)
        assert relative(found, tmp_path) == ["a/1.png", "b/2.png"]
        assert len(left_out) == 3

    def test_says_what_is_no_file_at_all(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.png")
        left_out = Tally()
        assert folders.below(tmp_path, left_out) == []
        assert left_out.names == {"no file": ["pipe.png"]}


def test_suffixes_count_in_any_case_and_others_are_named(tmp_path: Path) -> None:
    names = ("a.PNG", "b.jfif", "c.heic", "d.mp4", "e", "f.HEIC")
    left_out = Tally()
    found = folders.of_suffix([tmp_path / name for name in names], left_out)
    assert relative(found, tmp_path) == ["a.PNG", "b.jfif"]
    assert left_out.names == {
        ".heic": ["c.heic", "f.HEIC"],
        ".mp4": ["d.mp4"],
        "without suffix": ["e"],
    }


def test_a_tally_is_one_line_with_the_first_names(caplog: pytest.LogCaptureFixture) -> None:
    left_out = Tally()
    folders.tell("data", left_out)
    for i in range(5):
        left_out.add(".heic", f"{i}.heic")
    left_out.add("hidden", ".x")
    with caplog.at_level(logging.WARNING):
        folders.tell("data", left_out)
    (message,) = caplog.messages
    assert message == ("data: left out: .heic: 5 (0.heic, 1.heic, 2.heic, ...); hidden: 1 (.x)")
