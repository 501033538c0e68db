from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engineworks.runtime.errors import InputError
from engineworks.runtime.images import SUFFIXES
from engineworks.runtime.sources import VIDEO_SUFFIXES, Reader, open_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures in two folders, a note and a video; contents do not matter here."""
    for name in ("b.png", "a.JPG", "sub/c.webp", "sub/deep/d.tiff", "notes.md", "film.mp4"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


class TestASourceOfPictures:
    def test_is_one_file(self, folder: Path) -> None:
        source = open_source(str(folder / "b.png"))

        assert (source.kind, source.paths, source.num_images) == (
            "images",
            (folder / "b.png",),
            1,
        )

    def test_is_a_folder_with_all_below_it_sorted(self, folder: Path) -> None:
        source = open_source(str(folder))

        names = [path.relative_to(folder).as_posix() for path in source.paths]
        assert names == ["a.JPG", "b.png", "sub/c.webp", "sub/deep/d.tiff"]
        assert source.num_images == 4

    @pytest.mark.parametrize(
        ("pattern", "names"),
        [
            ("*.png", ["b.png"]),
            ("*", ["a.JPG", "b.png"]),
            ("**/*", ["a.JPG", "b.png", "sub/c.webp", "sub/deep/d.tiff"]),
            ("sub/[a-c].web?", ["sub/c.webp"]),
        ],
    )
    def test_is_a_glob(self, folder: Path, pattern: str, names: list[str]) -> None:
        source = open_source(str(folder / pattern))

        assert [path.relative_to(folder).as_posix() for path in source.paths] == names

    def test_is_a_relative_glob(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folder)

        assert open_source("*.png").paths == (Path("b.png"),)

    def test_is_a_file_whose_name_looks_like_a_glob(self, tmp_path: Path) -> None:
        (tmp_path / "a[1].png").touch()

        assert open_source(str(tmp_path / "a[1].png")).paths == (tmp_path / "a[1].png",)

    def test_is_a_list_in_its_own_order_relative_to_itself(self, folder: Path) -> None:
        elsewhere = folder / "sub" / "c.webp"
        text = f"# two of them\n../b.png\n\n  {elsewhere}  \nmissing.png\n"
        (folder / "sub" / "list.txt").write_text(text, encoding="utf-8-sig")

        source = open_source(str(folder / "sub" / "list.txt"))

        # what is missing is found out when it is read, and reported there
        assert source.paths == (
            folder / "sub" / "../b.png",
            elsewhere,
            folder / "sub" / "missing.png",
        )


class TestASourceThatMoves:
    @pytest.mark.parametrize("suffix", [*sorted(VIDEO_SUFFIXES), ".MP4"])
    def test_is_a_video_file(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"film{suffix}"
        path.touch()

        source = open_source(str(path))

        assert (source.kind, source.paths, source.address) == ("video", (path,), str(path))
        assert source.num_images is None

    @pytest.mark.parametrize("text", ["0", "12", "rtsp://camera/1", "RTSP://camera/1", "udp://:99"])
    def test_is_a_webcam_or_an_address(self, text: str) -> None:
        source = open_source(text)

        assert (source.kind, source.paths, source.address) == ("stream", (), text)
        assert source.num_images is None

    def test_is_not_a_folder_that_is_called_0(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "0").mkdir()
        (tmp_path / "0" / "a.png").touch()
        monkeypatch.chdir(tmp_path)

        assert open_source("0").kind == "stream"
        assert open_source("./0").kind == "images"


class TestASourceThatHoldsNothing:
    @pytest.mark.parametrize(
        "text", ["none.png", "none", "*.none", "empty", "notes.md", "list.txt"]
    )
    def test_is_refused_by_name_with_a_way_out(self, folder: Path, text: str) -> None:
        (folder / "empty").mkdir()
        (folder / "list.txt").write_text("# nothing\n\n")

        with pytest.raises(InputError) as caught:
            open_source(str(folder / text))

        assert text in caught.value.message
        assert caught.value.fix

    def test_is_refused_when_it_is_no_text_at_all(self) -> None:
        with pytest.raises(InputError, match="empty"):
            open_source("")

    def test_is_refused_when_the_list_is_binary(self, tmp_path: Path) -> None:
        (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00\x9f")

        with pytest.raises(InputError, match="UTF-8"):
            open_source(str(tmp_path / "list.txt"))

    def test_names_the_video_in_a_folder_of_videos(self, tmp_path: Path) -> None:
        (tmp_path / "film.mp4").touch()

        with pytest.raises(InputError) as caught:
            open_source(str(tmp_path))

        assert "film.mp4" in (caught.value.fix or "")


# without "/" and ".", which would make it search the whole machine
@given(st.text(st.characters(exclude_characters="/."), max_size=30))
def test_any_text_gives_a_source_or_one_clear_refusal(text: str) -> None:
    try:
        source = open_source(text)
    except InputError as error:
        assert error.fix
    else:
        assert source.kind in ("images", "video", "stream")


def test_no_suffix_is_both_a_picture_and_a_video() -> None:
    assert not SUFFIXES & VIDEO_SUFFIXES


class TestAReader:
    """Of a system whose images are not every picture: npy files, without those named ``part``."""

    @pytest.fixture
    def reader(self) -> Reader:
        return Reader(
            lambda path: np.zeros((1, 1, 3), np.uint8),
            frozenset({".npy", ".png"}),
            lambda path: path.stem != "part",
            takes_video=False,
        )

    def test_says_which_files_of_a_folder_are_images(self, tmp_path: Path, reader: Reader) -> None:
        for name in ("a.npy", "b.png", "c.jpg", "part.npy"):
            (tmp_path / name).touch()

        for text in (str(tmp_path), str(tmp_path / "*")):
            source = open_source(text, reader)
            assert [path.name for path in source.paths] == ["a.npy", "b.png"]
            assert source.reader is reader

    def test_travels_with_a_file_and_with_a_list(self, tmp_path: Path, reader: Reader) -> None:
        (tmp_path / "a.npy").touch()
        (tmp_path / "list.txt").write_text("a.npy\n")

        for name in ("a.npy", "list.txt"):
            source = open_source(str(tmp_path / name), reader)
            assert source.paths == (tmp_path / "a.npy",)
            assert source.reader is reader

    @pytest.mark.parametrize("name", ["film.mp4", "0", "rtsp://camera"])
    def test_refuses_what_moves(self, tmp_path: Path, reader: Reader, name: str) -> None:
        (tmp_path / "film.mp4").touch()
        text = str(tmp_path / name) if name == "film.mp4" else name

        with pytest.raises(InputError, match="no images of this system"):
            open_source(text, reader)

    def test_names_its_own_suffixes(self, tmp_path: Path, reader: Reader) -> None:
        with pytest.raises(InputError) as caught:
            open_source(str(tmp_path), reader)
        assert ".npy, .png" in (caught.value.fix or "")


class TestWhatIsLeftOut:
    def test_is_said_in_one_line(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        for name in ("c.heic", "d.jfif", "._b.png", "sub/Thumbs.db", ".cache/x.png"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()

        source = open_source(str(folder))

        assert [path.name for path in source.paths] == [
            "a.JPG",
            "b.png",
            "d.jfif",
            "c.webp",
            "d.tiff",
        ]
        (message,) = caplog.messages
        for kind in (".heic: 1", ".md: 1", ".mp4: 1 (film.mp4)", "hidden: 3"):
            assert kind in message

    def test_is_nothing_behind_a_link(self, folder: Path, tmp_path: Path) -> None:
        (folder / "again").symlink_to(folder)
        (folder / "sub").rename(folder.parent / f"{folder.name}-elsewhere")
        (folder / "sub").symlink_to(folder.parent / f"{folder.name}-elsewhere")

        for text in (str(folder), f"{folder}/**/*"):
            names = [p.relative_to(folder).as_posix() for p in open_source(text).paths]
            assert names == ["a.JPG", "b.png", "sub/c.webp", "sub/deep/d.tiff"]

    def test_by_a_glob_is_the_same(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        (folder / "__MACOSX").mkdir()
        (folder / "__MACOSX" / "b.png").touch()

        found = open_source(f"{folder}/**/*.*").paths

        assert [path.name for path in found] == ["a.JPG", "b.png", "c.webp", "d.tiff"]
        assert "hidden: 1" in caplog.text and ".mp4: 1" in caplog.text
