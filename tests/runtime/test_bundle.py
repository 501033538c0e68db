from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engineworks.runtime import bundle as bundles
from engineworks.runtime import files as files_of_the_system
from engineworks.runtime.borders import HeldOut
from engineworks.runtime.bundle import (
    MANIFEST_NAME,
    Bundle,
    GraphEntry,
    Manifest,
    Threshold,
    check_out,
    load_manifest,
    read,
    set_budget,
    set_threshold,
    write,
)
from engineworks.runtime.errors import BundleError, EngineworksError
from engineworks.runtime.preprocess import PreprocessSpec
from engineworks.runtime.tensors import TensorSpec

FILES = {
    "features.onnx": b"float graph",
    "int8/features.onnx": b"quantized graph",
    "bank.faiss": bytes(range(256)) * 20,
    "empty.json": b"",
}


def manifest(**changes: Any) -> Manifest:
    spec = TensorSpec(dtype="float32", shape=("batch", 3, 8, 8))
    graph = GraphEntry(
        inputs={"images": spec},
        outputs={"features": TensorSpec(dtype="float32", shape=("batch", 4, 6))},
        variants={"float": "features.onnx", "int8": "int8/features.onnx"},
    )
    content: dict[str, Any] = {
        "system": "noising",
        "graphs": {"features": graph},
        "preprocess": PreprocessSpec(size=(8, 8)),
        "thresholds": {"image": Threshold(value=1.5, source="drawn")},
        "params": {"k": 9, "range": [0.01, 0.5], "name": "café"},
        "assets": {"bank": "bank.faiss"},
        "reports": {"verdict": {"ship": "float"}},
    }
    return Manifest(**{**content, **changes})


def sources(folder: Path, files: dict[str, bytes] | None = None) -> dict[str, Path]:
    paths = {}
    for i, (name, content) in enumerate((files or FILES).items()):
        path = folder / f"source{i}"
        path.write_bytes(content)
        paths[name] = path
    return paths


def reseal(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit the manifest, and make its digest fit as docs/bundle-format.md says."""
    path = root / MANIFEST_NAME
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    content["digest"] = digest_of(content)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def digest_of(content: dict[str, Any]) -> str:
    """The digest as another tool would take it."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(
        json.dumps(rest, sort_keys=True, separators=(",", ":")).encode("ascii")
    ).hexdigest()


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.fixture
def made(tmp_path: Path, work: Path) -> Bundle:
    return write(tmp_path / "out" / "bundle", manifest(), sources(work))


class TestAWrittenBundle:
    def test_is_read_back_whole(self, made: Bundle) -> None:
        again = read(made.root)

        assert again == made
        assert {name: again.path(name).read_bytes() for name in FILES} == FILES
        assert again.manifest.graphs == manifest().graphs
        assert again.manifest.params == manifest().params

    def test_lists_size_and_hash_of_every_file(self, made: Bundle) -> None:
        entries = json.loads((made.root / MANIFEST_NAME).read_text())["files"]

        assert entries == {
            name: {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
            for name, content in FILES.items()
        }

    def test_has_a_digest_that_another_tool_can_take(self, made: Bundle) -> None:
        content = json.loads((made.root / MANIFEST_NAME).read_text(encoding="utf-8"))

        assert content["digest"] == digest_of(content)

    def test_stays_valid_when_it_is_moved_or_reached_by_a_link(
        self, made: Bundle, tmp_path: Path
    ) -> None:
        moved = tmp_path / "elsewhere"
        shutil.copytree(made.root, moved)
        (tmp_path / "link").symlink_to(moved)

        assert read(moved).manifest == read(tmp_path / "link").manifest == made.manifest

    def test_knows_its_assets_by_role(self, made: Bundle) -> None:
        assert made.asset("bank") == made.root / "bank.faiss"
        with pytest.raises(BundleError, match="has no 'table'"):
            made.asset("table")
        with pytest.raises(BundleError, match="no file 'source0'"):
            made.path("source0")

    def test_can_be_read_by_others(self, made: Bundle) -> None:
        assert (made.root / MANIFEST_NAME).stat().st_mode & 0o044 == 0o044


class TestDamage:
    @pytest.mark.parametrize("name", [n for n in (*FILES, MANIFEST_NAME) if FILES.get(n) != b""])
    @pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
    def test_of_a_flipped_byte_is_found_in_any_file(
        self, made: Bundle, name: str, where: float
    ) -> None:
        path = made.root / name
        data = bytearray(path.read_bytes())
        data[int(where * (len(data) - 1))] ^= 0x10
        path.write_bytes(data)

        with pytest.raises(BundleError, match=name):
            read(made.root)

    @settings(
        deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(st.data())
    def test_of_any_bit_of_the_manifest_is_found(self, made: Bundle, data: st.DataObject) -> None:
        whole = (made.root / MANIFEST_NAME).read_bytes()
        position = data.draw(st.integers(0, len(whole) - 1))
        bit = data.draw(st.integers(0, 7))
        broken = bytearray(whole)
        broken[position] ^= 1 << bit
        (made.root / MANIFEST_NAME).write_bytes(broken)

        try:
            with pytest.raises(BundleError):
                read(made.root)
        finally:
            (made.root / MANIFEST_NAME).write_bytes(whole)

    @pytest.mark.parametrize("name", [n for n in (*FILES, MANIFEST_NAME) if FILES.get(n) != b""])
    def test_of_a_truncated_file_is_found(self, made: Bundle, name: str) -> None:
        path = made.root / name
        path.write_bytes(path.read_bytes()[:-1])

        with pytest.raises(BundleError, match=name):
            read(made.root)

    @pytest.mark.parametrize("name", [*FILES, MANIFEST_NAME])
    def test_of_a_missing_file_is_found(self, made: Bundle, name: str) -> None:
        (made.root / name).unlink()

        with pytest.raises(BundleError, match=name):
            read(made.root)

    @pytest.mark.parametrize("name", ["extra.txt", ".hidden", "int8/extra.onnx", "new/file"])
    def test_by_an_extra_file_is_found(self, made: Bundle, name: str) -> None:
        (made.root / name).parent.mkdir(exist_ok=True)
        (made.root / name).touch()

        with pytest.raises(BundleError, match=rf"extra \['{name}'\]"):
            read(made.root)

    @pytest.mark.parametrize("name", [*FILES, MANIFEST_NAME])
    def test_by_a_link_to_the_same_content_is_found(
        self, made: Bundle, tmp_path: Path, name: str
    ) -> None:
        target = tmp_path / "target"
        (made.root / name).rename(target)
        (made.root / name).symlink_to(target)

        with pytest.raises(BundleError, match="link"):
            read(made.root)

    def test_by_a_linked_folder_is_found(self, made: Bundle, tmp_path: Path) -> None:
        (made.root / "int8").rename(tmp_path / "int8")
        (made.root / "int8").symlink_to(tmp_path / "int8")

        with pytest.raises(BundleError, match="int8"):
            read(made.root)

    def test_by_a_pipe_does_not_block(self, made: Bundle) -> None:
        (made.root / "empty.json").unlink()
        os.mkfifo(made.root / "empty.json")

        with pytest.raises(BundleError, match="no plain file"):
            read(made.root)


class TestAManifest:
    @pytest.mark.parametrize(
        "name",
        ["../x", "/etc/passwd", "a\\b", "int8/../../x", "", "a//b", "./a", "a/", ".hidden", "C:x"],
    )
    def test_that_names_a_path_outside_is_refused(self, made: Bundle, name: str) -> None:
        entry = {"sha256": "0" * 64, "size_bytes": 0}
        reseal(made.root, lambda content: content["files"].update({name: entry}))

        with pytest.raises(BundleError, match="not a plain relative path"):
            read(made.root)

    @pytest.mark.parametrize("version", [0, 2, 1.5, "1", None])
    def test_of_another_schema_version_is_refused_by_name(
        self, made: Bundle, version: object
    ) -> None:
        reseal(made.root, lambda content: content.update(schema_version=version))

        with pytest.raises(BundleError, match="schema version") as error:
            read(made.root)

        assert repr(version) in error.value.message

    def test_of_a_newer_schema_is_named_before_its_fields_are(self, made: Bundle) -> None:
        reseal(made.root, lambda content: content.update(schema_version=2, brand_new=True))

        with pytest.raises(BundleError, match="schema version 2"):
            read(made.root)

    @pytest.mark.parametrize(
        "change",
        [
            lambda content: content.update(unknown=1),
            lambda content: content["preprocess"].update(gamma=2.2),
            lambda content: content["thresholds"]["image"].update(unit="m"),
            lambda content: content["graphs"]["features"].update(layout="NCHW"),
            lambda content: content["files"]["bank.faiss"].update(mode=7),
            lambda content: content.pop("system"),
            lambda content: content["thresholds"]["image"].update(value="1.5"),
            lambda content: content["files"]["bank.faiss"].update(sha256="x"),
            lambda content: content["files"]["bank.faiss"].update(size_bytes=-1),
        ],
    )
    def test_with_an_unknown_missing_or_ill_typed_field_is_refused(
        self, made: Bundle, change: Callable[[dict[str, Any]], None]
    ) -> None:
        reseal(made.root, change)

        with pytest.raises(BundleError, match="does not follow the bundle format"):
            read(made.root)

    def test_that_was_edited_is_refused_with_the_way_to_move_thresholds(self, made: Bundle) -> None:
        path = made.root / MANIFEST_NAME
        path.write_text(path.read_text().replace('"value": 1.5', '"value": 2.5'))

        with pytest.raises(BundleError, match="changed after it was written") as error:
            read(made.root)

        assert "set-threshold" in (error.value.fix or "")

    @pytest.mark.parametrize("kind", ["variant", "asset"])
    def test_that_refers_to_an_unlisted_file_is_refused(self, made: Bundle, kind: str) -> None:
        def change(content: dict[str, Any]) -> None:
            if kind == "asset":
                content["assets"]["table"] = "table.json"
            else:
                content["graphs"]["features"]["variants"]["int8-u8"] = "table.json"

        reseal(made.root, change)

        with pytest.raises(BundleError, match=r"refers to 'table\.json'"):
            read(made.root)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "[]",
            "null",
            '{"format": "something else"}',
            '{"format": "engineworks-bundle", "schema_version": NaN}',
            "\xff",
            "[" * 100_000,
            "9" * 10_000,
        ],
        ids=range(9),
    )
    def test_that_is_none_is_refused(self, made: Bundle, text: str) -> None:
        (made.root / MANIFEST_NAME).write_bytes(text.encode("latin-1"))

        with pytest.raises(BundleError):
            load_manifest(made.root)

    def test_is_all_that_makes_a_folder_a_bundle(self, tmp_path: Path) -> None:
        for root in (tmp_path, tmp_path / "absent"):
            with pytest.raises(BundleError, match="is no bundle"):
                read(root)


class TestWriting:
    @pytest.mark.parametrize("name", ["../x", "/x", "a\\b", ".x", "a/../b", "", MANIFEST_NAME])
    def test_refuses_names_that_leave_the_folder(
        self, tmp_path: Path, work: Path, name: str
    ) -> None:
        with pytest.raises(BundleError, match="plain relative path"):
            write(tmp_path / "bundle", manifest(), sources(work) | {name: work / "source0"})

        assert not (tmp_path / "bundle").exists()

    @pytest.mark.parametrize("replace", [True, False])
    def test_never_touches_a_folder_that_is_no_bundle(
        self, tmp_path: Path, work: Path, replace: bool
    ) -> None:
        out = tmp_path / "holiday"
        out.mkdir()
        (out / "photo.jpg").write_bytes(b"precious")

        with pytest.raises(BundleError, match="already exists"):
            write(out, manifest(), sources(work), replace=replace)

        assert tree(out) == {"photo.jpg": b"precious"}

    def test_replaces_a_bundle_only_when_told_to(self, made: Bundle, work: Path) -> None:
        with pytest.raises(BundleError, match="already exists") as error:
            write(made.root, manifest(labels=("new",)), sources(work))
        assert "--exist-ok" in (error.value.fix or "")
        assert read(made.root) == made

        write(made.root, manifest(labels=("new",)), sources(work), replace=True)

        assert read(made.root).manifest.labels == ("new",)
        assert list(made.root.parent.iterdir()) == [made.root], "nothing is left beside it"

    def test_never_loses_a_file_that_somebody_put_into_a_bundle(
        self, made: Bundle, work: Path
    ) -> None:
        (made.root / "signature.json").write_text("{}")  # is the bundle's
        (made.root / "notes.txt").write_text("mine")
        with pytest.raises(BundleError, match=r"not the bundle's.*notes\.txt"):
            write(made.root, manifest(), sources(work), replace=True)
        assert (made.root / "notes.txt").read_text() == "mine"

        (made.root / "notes.txt").unlink()
        write(made.root, manifest(), sources(work), replace=True)
        assert not (made.root / "signature.json").exists()

    def test_leaves_a_folder_alone_that_appears_meanwhile(
        self, tmp_path: Path, work: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "new"
        sha256_file = bundles.sha256_file

        def late(path: Path) -> str:
            out.mkdir(exist_ok=True)
            (out / "thesis.txt").write_text("years of work")
            return sha256_file(path)

        monkeypatch.setattr(bundles, "sha256_file", late)
        for replace in (False, True):
            with pytest.raises(BundleError):
                write(out, manifest(), sources(work), replace=replace)
            assert tree(out) == {"thesis.txt": b"years of work"}

    def test_may_take_files_from_the_bundle_that_it_replaces(self, made: Bundle) -> None:
        files = {name: made.path(name) for name in FILES}

        write(made.root, manifest(labels=("new",)), files, replace=True)

        assert read(made.root).path("bank.faiss").read_bytes() == FILES["bank.faiss"]

    @pytest.mark.parametrize("replace", [True, False])
    @pytest.mark.parametrize("broken", ["copy", "fsync", "rename into place"])
    def test_that_fails_in_the_middle_leaves_all_as_it_was(
        self,
        tmp_path: Path,
        work: Path,
        monkeypatch: pytest.MonkeyPatch,
        replace: bool,
        broken: str,
    ) -> None:
        out = tmp_path / "out" / "bundle"
        out.parent.mkdir()
        if replace:
            write(out, manifest(), sources(work))
        before = tree(out.parent)
        calls = 0

        def fail_late(original: Callable[..., Any], at: int) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == at:
                    raise OSError("disk full")
                return original(*args, **options)

            return call

        with monkeypatch.context() as patch:
            if broken == "copy":
                patch.setattr(shutil, "copyfileobj", fail_late(shutil.copyfileobj, 3))
            elif broken == "fsync":
                patch.setattr(os, "fsync", fail_late(os.fsync, 2))
            else:
                rename = files_of_the_system._rename_with_flag
                patch.setattr(files_of_the_system, "_rename_with_flag", fail_late(rename, 1))
            with pytest.raises(OSError, match="disk full"):
                write(out, manifest(labels=("new",)), sources(work), replace=replace)

        assert tree(out.parent) == before
        assert list(out.parent.iterdir()) == ([out] if replace else [])
        if replace:
            assert read(out).manifest.labels == ()

    def test_refuses_a_reference_to_a_file_that_is_not_given(self, made: Bundle) -> None:
        with pytest.raises(BundleError, match=r"refers to 'table\.json'"):
            write(
                made.root,
                manifest(assets={"table": "table.json"}),
                {name: made.path(name) for name in FILES},
                replace=True,
            )

        assert read(made.root) == made

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("field", ["params", "reports", "gate"])
    def test_refuses_a_number_that_json_cannot_hold(
        self, tmp_path: Path, work: Path, value: float, field: str
    ) -> None:
        with pytest.raises(BundleError, match="not finite"):
            write(tmp_path / "bundle", manifest(**{field: {"x": value}}), sources(work))

        assert not (tmp_path / "bundle").exists()


class TestADestination:
    def test_that_is_free_may_be_written(self, tmp_path: Path) -> None:
        check_out(tmp_path / "new" / "bundle", replace=False)

    def test_that_is_a_bundle_may_be_written_only_to_replace_it(self, made: Bundle) -> None:
        check_out(made.root, replace=True)
        with pytest.raises(BundleError, match="already exists"):
            check_out(made.root, replace=False)

    @pytest.mark.parametrize("replace", [True, False])
    def test_that_is_something_else_may_never_be_written(
        self, tmp_path: Path, replace: bool
    ) -> None:
        (tmp_path / "file").touch()
        for other in (tmp_path, tmp_path / "file"):
            with pytest.raises(BundleError, match="is no bundle"):
                check_out(other, replace=replace)


class TestMovingAThreshold:
    def test_changes_the_manifest_alone_and_seals_it_again(self, made: Bundle) -> None:
        before = tree(made.root)

        moved = set_threshold(made, "image", 2.25)

        assert read(made.root) == moved
        assert moved.manifest.thresholds["image"] == Threshold(value=2.25, source="set by hand")
        assert moved.manifest.digest != made.manifest.digest
        changed = {name for name, data in tree(made.root).items() if data != before[name]}
        assert changed == {MANIFEST_NAME}

    def test_back_restores_the_value(self, made: Bundle) -> None:
        set_threshold(set_threshold(made, "image", 2.25), "image", 1.5)

        assert read(made.root).manifest.thresholds["image"].value == 1.5

    def test_to_a_budget_needs_no_pictures(self, made: Bundle) -> None:
        scores = np.random.default_rng(0).gumbel(2.0, 0.3, 400).astype(np.float32)
        held_out = HeldOut.of(scores)
        kept = Threshold(value=1.5, source="here", held_out=held_out)
        manifest = made.manifest.model_copy(
            update={"thresholds": made.manifest.thresholds | {"image": kept}, "files": {}}
        )
        files = {name: made.path(name) for name in made.manifest.files}
        scored = write(made.root.with_name("scored"), manifest, files)

        moved = set_budget(set_threshold(scored, "image", 9.0), "image", 0.05)

        threshold = read(scored.root).manifest.thresholds["image"]
        assert threshold == moved.manifest.thresholds["image"]
        # the quantiles are kept at every half per cent
        assert threshold.value == pytest.approx(float(np.quantile(scores, 0.95)), rel=1e-6)
        assert threshold.source == "false-reject budget 0.05 on 400 held-out pictures"
        assert threshold.held_out == held_out

    def test_to_a_budget_without_scores_says_what_to_do(self, made: Bundle) -> None:
        with pytest.raises(BundleError, match="keeps no scores") as error:
            set_budget(made, "image", 0.05)
        assert "number" in (error.value.fix or "")

    def test_a_threshold_without_scores_is_written_as_it_was_before_there_were_any(self) -> None:
        # bundles written before keep their bytes, and so their digest
        assert Threshold(value=1.5, source="here").model_dump(mode="json") == {
            "value": 1.5,
            "source": "here",
        }

    def test_of_an_unknown_name_says_which_there_are(self, made: Bundle) -> None:
        with pytest.raises(BundleError, match="no threshold 'pixels'") as error:
            set_threshold(made, "pixels", 1.0)

        assert "image" in (error.value.fix or "")

    @pytest.mark.parametrize("value", [float("nan"), float("-inf")])
    def test_refuses_what_is_no_finite_number(self, made: Bundle, value: float) -> None:
        with pytest.raises(EngineworksError):
            set_threshold(made, "image", value)

        assert read(made.root) == made

    def test_that_fails_leaves_the_old_manifest(
        self, made: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(_descriptor: int) -> None:
            raise OSError("disk full")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", broken)
            with pytest.raises(OSError, match="disk full"):
                set_threshold(made, "image", 2.25)

        assert read(made.root) == made
