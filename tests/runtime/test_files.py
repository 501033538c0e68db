from __future__ import annotations

import errno
import os
import resource
import stat
import tempfile
from pathlib import Path

import pytest

from engineworks.runtime import files
from tests.campaign import faults

any_system = pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])


@pytest.fixture(autouse=True)
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``named``, a file system that has no unnamed files and no exchange."""
    if request.node.callspec.params.get("named") if hasattr(request.node, "callspec") else False:
        monkeypatch.setattr(files, "_open_unnamed", lambda _folder: None)
        monkeypatch.setattr(files, "_rename_with_flag", lambda *_arguments: False)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def leftover(folder: Path) -> Path:
    path = folder / ".engineworks-0123456789abcdef.tmp"
    path.write_bytes(b"half")
    return path


class TestAFile:
    @any_system
    def test_is_replaced_and_keeps_its_mode(self, tmp_path: Path, named: bool) -> None:
        path = tmp_path / "new" / "a.txt"
        files.write(path, "one")
        path.chmod(0o640)

        files.write(path, "two")

        assert path.read_text() == "two"
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        assert names(path.parent) == ["a.txt"]

    @any_system
    def test_that_is_there_stays_where_it_shall_not_be_replaced(
        self, tmp_path: Path, named: bool
    ) -> None:
        (tmp_path / "a").write_text("mine")

        with pytest.raises(FileExistsError):
            files.write(tmp_path / "a", "new", replace=False)
        files.write(tmp_path / "b", "new", replace=False)

        assert (tmp_path / "a").read_text() == "mine"
        assert names(tmp_path) == ["a", "b"]

    @any_system
    def test_may_have_as_long_a_name_as_the_system_takes(self, tmp_path: Path, named: bool) -> None:
        for name in ("a" * 255, "検" * 85):
            files.write(tmp_path / name, "x")

            assert (tmp_path / name).read_text() == "x"

    def test_respects_the_mask_of_the_user(self, tmp_path: Path) -> None:
        before = os.umask(0o027)
        try:
            files.write(tmp_path / "a", "x")
        finally:
            os.umask(before)

        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640

    def test_is_found_behind_links_which_stay(self, tmp_path: Path) -> None:
        (tmp_path / "far").mkdir()
        (tmp_path / "link").symlink_to("second")
        (tmp_path / "second").symlink_to(tmp_path / "far" / "a")

        for content in ("new", "replaced"):
            files.write(tmp_path / "link", content)

            assert (tmp_path / "far" / "a").read_text() == content
            assert (tmp_path / "link").is_symlink()
            assert (tmp_path / "second").is_symlink()

    def test_in_a_circle_of_links_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")

        with pytest.raises(OSError, match="symbolic links") as caught:
            files.write(tmp_path / "a", "x")

        assert caught.value.filename == str(tmp_path / "a")

    def test_that_is_a_folder_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(IsADirectoryError):
            files.write(tmp_path, "x")

    @pytest.mark.parametrize("below", [False, True])
    def test_that_is_a_device_is_written_into(self, tmp_path: Path, below: bool) -> None:
        device = Path("/dev/null")
        if below:
            (tmp_path / "link").symlink_to(device)
        files.write(tmp_path / "link" if below else device, "x")

        assert device.is_char_device()

    def test_that_is_a_full_device_is_an_error_with_its_name(self) -> None:
        with pytest.raises(OSError, match="No space left") as caught:
            files.write(Path("/dev/full"), "x")

        assert caught.value.filename == "/dev/full"

    def test_that_is_a_pipe_is_written_into(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)

        files.write(tmp_path / "pipe", "through")

        assert os.read(reader, 100) == b"through"
        assert (tmp_path / "pipe").is_fifo()
        os.close(reader)

    def test_that_stands_for_an_open_one_is_written_on_with(self, tmp_path: Path) -> None:
        with (tmp_path / "out").open("w+b") as file:
            file.write(b"before ")
            file.flush()

            files.write(Path(f"/dev/fd/{file.fileno()}"), "after")

            assert (tmp_path / "out").read_text() == "before after"


class TestLeftovers:
    def test_of_the_dead_are_removed_by_the_next_write(self, tmp_path: Path) -> None:
        leftover(tmp_path)
        folder = tmp_path / ".engineworks-00000000000000ff.tmp"
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "x").touch()

        files.write(tmp_path / "a", "x")

        assert names(tmp_path) == ["a"]

    def test_of_the_living_stay(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files, "_open_unnamed", lambda _folder: None)
        with files.NewFile(tmp_path) as new, files._temporary_folder(tmp_path) as folder:
            files.write(tmp_path / "a", "x")

            assert new.path.exists()
            assert folder.exists()
            new.file.write(b"whole")
            new.place(tmp_path / "b")
        assert (tmp_path / "b").read_bytes() == b"whole"
        assert names(tmp_path) == ["a", "b"]

    def test_are_only_what_is_named_so(self, tmp_path: Path) -> None:
        mine = [".git", ".a.txt.tmp", ".engineworks-1.tmp", "engineworks-0123456789abcdef.tmp"]
        for name in mine:
            (tmp_path / name).write_text("mine")

        files.write(tmp_path / "z", "x")

        assert names(tmp_path) == sorted([*mine, "z"])

    def test_are_no_way_out_of_the_folder(self, tmp_path: Path) -> None:
        (tmp_path / "precious").mkdir()
        (tmp_path / "precious" / "thesis").touch()
        (tmp_path / "out").mkdir()
        link = tmp_path / "out" / ".engineworks-0123456789abcdef.tmp"
        link.symlink_to(tmp_path / "precious")

        files.sweep(tmp_path / "out")

        assert (tmp_path / "precious" / "thesis").exists()

    def test_of_a_killed_writer_are_none_where_files_need_no_name(self, tmp_path: Path) -> None:
        def run() -> None:
            with files.NewFile(tmp_path) as new:
                new.file.write(b"x" * 100_000)
                faults.die()

        assert faults.in_child(run) == -9
        assert names(tmp_path) == []


class TestAJournal:
    def test_is_finished_by_the_next_reader(self, tmp_path: Path) -> None:
        journal = tmp_path / ".engineworks-0123456789abcdef.tmp"
        for name in ("old", "new"):
            (journal / name).mkdir(parents=True)
            (journal / name / "x").write_text(name)
        (journal / "journal").write_text("out")

        assert files.recover(tmp_path / "out")

        assert (tmp_path / "out" / "x").read_text() == "new"
        assert names(tmp_path) == ["out"]

    def test_of_another_folder_is_not_taken(self, tmp_path: Path) -> None:
        journal = tmp_path / ".engineworks-0123456789abcdef.tmp"
        journal.mkdir()
        (journal / "journal").write_text("other")

        assert not files.recover(tmp_path / "out")
        assert journal.exists()


class TestRoom:
    def test_is_taken_at_once(self, tmp_path: Path) -> None:
        files.allocate(tmp_path / "a", 100_000)

        state = (tmp_path / "a").stat()
        assert state.st_size == 100_000
        assert state.st_blocks * 512 >= 100_000

    def test_that_is_not_there_is_an_error(self, tmp_path: Path) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                files.allocate(tmp_path / "a", 100_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

        assert names(tmp_path) == []


class TestLines:
    def test_stand_in_the_file_at_once(self, tmp_path: Path) -> None:
        lines = files.Lines(tmp_path / "a")
        lines.add("caf\udce9\n")

        assert (tmp_path / "a").read_bytes() == b"caf\xe9\n"
        lines.close()

    def test_never_take_the_place_of_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("mine")

        with pytest.raises(FileExistsError):
            files.Lines(tmp_path / "a")

        assert (tmp_path / "a").read_text() == "mine"

    def test_are_whole_where_the_disk_is_full(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines = files.Lines(tmp_path / "a")
        lines.add("one\n")
        write = os.write

        def half(descriptor: int, data: bytes) -> int:
            if len(data) < 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(descriptor, data[: len(data) - 2])

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", half)
            with pytest.raises(OSError, match="No space") as caught:
                lines.add("second\n")
        lines.add("third\n")
        lines.close()

        assert caught.value.filename == str(tmp_path / "a")
        assert (tmp_path / "a").read_text() == "one\nthird\n"

    def test_tell_that_they_were_removed_meanwhile(self, tmp_path: Path) -> None:
        lines = files.Lines(tmp_path / "a")
        lines.add("one\n")
        (tmp_path / "a").unlink()

        with pytest.raises(FileNotFoundError, match="removed while") as caught:
            lines.sync()
        assert caught.value.filename == str(tmp_path / "a")
        with pytest.raises(FileNotFoundError, match="removed while"):
            lines.close()

    @pytest.mark.parametrize(
        ("content", "kept"),
        [("a\nb", "a\n"), ("a\n", "a\n"), ("abc", ""), ("", ""), ("a\n" + "b" * 200_000, "a\n")],
    )
    def test_that_were_cut_are_removed(self, tmp_path: Path, content: str, kept: str) -> None:
        (tmp_path / "a").write_text(content)

        files.cut_to_whole_lines(tmp_path / "a")

        assert (tmp_path / "a").read_text() == kept


class TestScratch:
    def test_is_gone_afterwards_and_after_a_kill_with_the_next(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

        def run() -> None:
            with files.scratch(tmp_path) as folder:
                (folder / "x").touch()
                faults.die()

        assert faults.in_child(run) == -9
        assert len(names(tmp_path)) == 1
        with files.scratch(tmp_path) as folder:
            assert names(tmp_path) == [folder.name]
        assert names(tmp_path) == []

    def test_lies_near_where_there_is_no_temporary_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def none() -> str:
            raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

        monkeypatch.setattr(tempfile, "gettempdir", none)

        with files.scratch(tmp_path / "out") as folder:
            assert folder.parent == tmp_path / "out"
