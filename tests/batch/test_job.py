"""A job up to where Ray begins."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engineworks import testing
from engineworks.batch import job
from engineworks.batch.blocks import Blocks, block_path, write
from engineworks.batch.job import Summary, run
from engineworks.batch.mapper import Mapper
from engineworks.runtime import images
from engineworks.runtime.errors import InputError, UsageError
from engineworks.runtime.testing import draw_reference

OPTIONS: dict[str, Any] = {
    **{"refs": (), "conf": None, "iou": None, "backend": "auto", "precision": "auto"},
    **{"threads": 1, "batch": 8, "maps": False, "signers": (), "host_code": False},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    testing.write_tiny_noising_bundle(folder / "bundle")
    testing.write_tiny_noising_bundle(folder / "other", size=(32, 32))
    testing.write_parts(folder / "data")
    return folder


def go(bundle: Path, source: Path, out: Path, **changes: Any) -> tuple[Summary, list[str]]:
    said: list[str] = []
    summary = Summary()
    opening = partial(Mapper, bundle, **{**OPTIONS, **changes})
    run(
        opening,
        str(source),
        out,
        block=5,
        progress=lambda _done, _total: None,
        say=said.append,
        summary=summary,
    )
    return summary, said


@pytest.fixture
def done(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose blocks are all there: those who have them need no Ray."""

    def work(blocks: Blocks, missing: Any, opening: Any, *_rest: Any) -> None:
        with opening() as mapper:
            for number in missing:
                path = block_path(blocks.out, number)
                write(path, mapper.schema, [mapper.read(blocks.share(number))])

    with monkeypatch.context() as patched:
        patched.setattr(job, "_work", work)
        go(root / "bundle", root / "data", tmp_path / "out")
    return tmp_path / "out"


class TestAJobThatIsDone:
    def test_has_nothing_left_to_do(self, root: Path, done: Path) -> None:
        before = {path.name: path.stat().st_mtime_ns for path in done.iterdir()}
        summary, said = go(root / "bundle", root / "data", done)
        assert (summary.num_done, summary.num_failed, summary.num_new) == (20, 0, 0)
        assert len(said) == 1
        assert {path.name: path.stat().st_mtime_ns for path in done.iterdir()} == before

    def test_refuses_another_bundle(self, root: Path, done: Path) -> None:
        with pytest.raises(UsageError, match="made otherwise") as refused:
            go(root / "other", root / "data", done)
        assert "bundle: " in str(refused.value)

    @pytest.mark.parametrize(
        ("changes", "name"), [({"maps": True}, "maps"), ({"backend": "ort"}, "backend")]
    )
    def test_refuses_other_settings(
        self, changes: dict[str, Any], name: str, root: Path, done: Path
    ) -> None:
        with pytest.raises(UsageError, match=f"{name}: "):
            go(root / "bundle", root / "data", done, **changes)

    def test_refuses_other_pictures(self, root: Path, done: Path) -> None:
        with pytest.raises(UsageError, match="num_sources: 20, now 8"):
            go(root / "bundle", root / "data" / "test", done)


class TestAJobThatCannotBegin:
    def test_has_a_source_that_is_no_pictures(self, root: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="take `infer` for videos and streams"):
            go(root / "bundle", Path("0"), tmp_path / "out")
        with pytest.raises(InputError):
            go(root / "bundle", tmp_path / "nothing", tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestReferences:
    def test_are_known_by_what_they_show(self, tmp_path: Path, rng: Any) -> None:
        folder = testing.write_references(tmp_path / "refs", ["blue", "red"])
        before = job._digest((folder,))
        assert job._digest((folder / "blue", folder / "red")) == before
        (folder / "red").rename(folder / "rot")
        renamed = job._digest((folder,))
        images.write(folder / "blue" / "0.png", draw_reference(rng, (48, 40), "blue"))
        assert len({before, renamed, job._digest((folder,))}) == 3
        box = folder / "blue" / "0.png@1,1,20,20"
        assert job._digest((box,)) != job._digest((box.with_name("0.png@1,1,20,21"),))
