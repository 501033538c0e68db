"""A mapper without Ray: batches in, rows out, and both as plain Arrow."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from engineworks import testing
from engineworks.batch import Mapper, mapper, schema_of
from engineworks.runtime import images
from engineworks.runtime.errors import BundleError, InputError, UsageError
from engineworks.runtime.infer import infer
from engineworks.runtime.sources import open_source
from engineworks.runtime.systems import SYSTEMS
from engineworks.runtime.tables import LINES_NAME

# system -> what writes its bundle, its pictures, and where these lie
_SYSTEMS: dict[str, tuple[Callable[..., Any], Callable[..., Any], str]] = {
    "backbone": (testing.write_tiny_backbone_bundle, testing.write_parts, "test"),
    "noising": (testing.write_tiny_noising_bundle, testing.write_parts, "test"),
    "paco": (testing.write_tiny_paco_bundle, testing.write_flowers, "test"),
    "refdet": (testing.write_tiny_refdet_bundle, testing.write_scenes, "images"),
    "stripe": (testing.write_tiny_stripe_bundle, testing.write_strips, "test"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle and pictures of each system, one of them broken."""
    folder = tmp_path_factory.mktemp("mapped")
    for name, (write_bundle, write_data, pictures) in _SYSTEMS.items():
        write_bundle(folder / name / "bundle")
        write_data(folder / name / "data")
        (folder / name / "data" / pictures / "zz.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def parts(root: Path) -> list[Path]:
    return sorted((root / "noising" / "data" / "test").rglob("*.png"))


@pytest.fixture
def opened(root: Path) -> Any:
    with Mapper(root / "noising" / "bundle") as made:
        yield made


def column(values: list[Any]) -> Any:
    """A column of objects, as Ray gives it."""
    made = np.empty(len(values), object)
    made[:] = values
    return made


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row as a line of ``results.jsonl`` has it."""
    return {name: value for name, value in row.items() if value is not None}


def comparable(name: str, line: dict[str, Any]) -> dict[str, Any]:
    """A line of ``results.jsonl`` without what has no column, at the precision of its column."""
    for found in line.get("objects", []):
        assert found.pop("track") is None
    if "embedding" in line:
        line["embedding"] = np.float32(line["embedding"]).tolist()
    return {key: value for key, value in line.items() if value is not None}


class TestRows:
    def test_has_every_system(self) -> None:
        assert set(_SYSTEMS) == set(SYSTEMS)

    @pytest.mark.parametrize("name", _SYSTEMS)
    def test_are_those_of_infer(self, name: str, root: Path, tmp_path: Path) -> None:
        folder = root / name
        with Mapper(folder / "bundle", batch=3) as opened:
            text = str(folder / "data" / _SYSTEMS[name][2])
            source = open_source(text, opened.system.reader)
            infer(opened.system, source, tmp_path, batch=3, jsonl=True)
            table = opened.read([str(path) for path in source.paths])
        lines = [json.loads(line) for line in (tmp_path / LINES_NAME).read_text().splitlines()]
        assert [plain(row) for row in table.to_pylist()] == [comparable(name, x) for x in lines]
        assert table.schema == schema_of(name)
        assert [row["source"] for row in table.to_pylist() if row["error"]] == [f"{text}/zz.png"]

    @pytest.mark.parametrize("name", _SYSTEMS)
    def test_have_one_schema_whatever_they_hold(self, name: str, root: Path) -> None:
        with Mapper(root / name / "bundle") as opened:
            broken = {"path": column(["a.png"]), "bytes": column([b"no picture"])}
            for rows in ({"path": column([]), "bytes": column([])}, broken):
                assert opened(rows).schema == opened.schema == schema_of(name)

    @pytest.mark.parametrize("name", ["noising", "stripe"])
    def test_have_maps_where_asked(self, name: str, root: Path) -> None:
        with Mapper(root / name / "bundle", maps=True) as opened:
            folder = root / name / "data" / "test"
            path = next(p for p in opened.system.reader.below(folder) if p.name != "zz.png")
            (row,) = opened.read([str(path)]).to_pylist()
            (result,) = opened.system.infer([opened.system.reader.read(path)])
        flat = np.array(row["map"], np.float32)
        found = flat.reshape(row["map_height"], row["map_width"])
        assert np.array_equal(found, result.map_HW)  # type: ignore[attr-defined]

    def test_spell_out_names_that_are_no_text(self, opened: Mapper) -> None:
        (row,) = opened.read(["a\udcff.png"]).to_pylist()
        assert row["source"] == r"a\udcff.png"
        assert row["error"].startswith(r"cannot read a\udcff.png")

    def test_of_a_result_that_is_not_finite_is_an_error(
        self, opened: Mapper, parts: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(system: Any, pictures: Any) -> Any:
            return [dataclasses.replace(r, score=float("nan")) for r in system.infer(pictures)]

        monkeypatch.setattr(mapper, "answers", broken)
        (row,) = opened.read([str(parts[0])]).to_pylist()
        assert "not finite" in row["error"]
        assert row["score"] is row["width"] is None


class TestBatches:
    def test_of_files_tensors_and_structs_have_the_same_answers(
        self, opened: Mapper, parts: list[Path]
    ) -> None:
        good = parts[:5]
        names = column([str(path) for path in good])
        files = [path.read_bytes() for path in good]
        pixels = [images.read(path) for path in good]
        for array in pixels:
            array.setflags(write=False)  # as what lies in Ray's memory
        expected = opened.read(list(names))
        assert not any(expected["error"].to_pylist())
        for given in (
            {"path": names, "bytes": column(files)},
            {"source": names, "image": column(pixels)},
            {"source": names, "image": np.stack(pixels)},
            {"path": names, "image": column([{"bytes": file, "path": None} for file in files])},
        ):
            assert opened(given).equals(expected)

    def test_may_have_pictures_that_are_none(self, opened: Mapper, parts: list[Path]) -> None:
        good = images.read(parts[0])
        given = [good, None, good[:, :, 0], good.astype(np.float64), b"", good]
        names = column([f"{i}.png" for i in range(len(given))])
        rows = opened({"path": names, "image": column(given)}).to_pylist()
        assert [row["error"] is None for row in rows] == [True, False, False, False, False, True]
        assert rows[0]["score"] == rows[5]["score"]
        assert all(row["score"] is None for row in rows[1:5])

    @pytest.mark.parametrize("missing", ["path", "bytes"])
    def test_must_have_names_and_pictures(self, missing: str, opened: Mapper) -> None:
        rows = {"path": column(["a"]), "bytes": column([b""]), "label": column([1])}
        del rows[missing]
        with pytest.raises(InputError, match="the rows have the columns") as refused:
            opened(rows)
        assert "include_paths" in str(refused.value)

    def test_are_plain_arrow(self, opened: Mapper, parts: list[Path]) -> None:
        table = opened.read([str(path) for path in parts])
        assert not any(isinstance(kind, pa.BaseExtensionType) for kind in table.schema.types)


class TestAMapper:
    def test_can_be_sent_to_another_process(self, opened: Mapper, parts: list[Path]) -> None:
        names = [str(path) for path in parts]
        with ForkingPickler.loads(ForkingPickler.dumps(opened)) as other:
            assert other.system is not opened.system
            assert other.read(names).equals(opened.read(names))
        assert ForkingPickler.loads(ForkingPickler.dumps(Mapper)) is Mapper

    def test_has_one_thread_unless_told_otherwise(self, root: Path) -> None:
        for given, threads in (({}, 1), ({"threads": 2}, 2)):
            with Mapper(root / "noising" / "bundle", **given) as opened:
                assert opened.system.threads == threads  # type: ignore[attr-defined]

    def test_refuses_another_bundle_than_it_was_told_of(self, root: Path) -> None:
        with pytest.raises(BundleError, match="another bundle"):
            Mapper(root / "noising" / "bundle", digest="0" * 64)

    def test_refuses_maps_of_what_has_none(self, root: Path) -> None:
        with pytest.raises(UsageError, match="gives no maps"):
            Mapper(root / "paco" / "bundle", maps=True)

    def test_looks_for_what_it_is_shown(self, root: Path, tmp_path: Path) -> None:
        references = testing.write_references(tmp_path / "refs", ["yellow"])
        paths = sorted((root / "refdet" / "data" / "images").rglob("*.png"))
        with Mapper(root / "refdet" / "bundle", refs=[references], conf=0.1) as opened:
            names = {
                found["name"]
                for row in opened.read([str(path) for path in paths]).to_pylist()
                for found in row["objects"] or ()
            }
        assert names == {"yellow"}
