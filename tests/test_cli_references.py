from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engineworks.runtime.bundle import read, write
from engineworks.runtime.testing import (
    write_parts,
    write_references,
    write_scenes,
    write_tiny_noising_bundle,
    write_tiny_refdet_bundle,
)
from tests.command import (
    cli,
    refused,
)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("data"), size=(48, 64), num_train=10)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that no torch was needed for; read-only."""
    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    write_tiny_noising_bundle(folder, int8=True)
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures for a test, with two of the objects blue, red and yellow in each."""
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def finder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that looks for blue and red, unless it is asked for something else; read-only."""
    folder = tmp_path_factory.mktemp("finder") / "bundle"
    write_tiny_refdet_bundle(folder, int8=True)
    return folder


def found_in(out: Path) -> set[str]:
    return {each["name"] for line in lines(out / "results.jsonl") for each in line["objects"]}


class TestReferences:
    def test_say_what_is_looked_for_as_pictures_and_as_a_file(
        self, finder: Path, scenes: Path, tmp_path: Path
    ) -> None:
        source = ("--source", scenes / "images", "--jsonl")
        plain = cli("infer", finder, *source, "--out", tmp_path / "plain")
        assert plain.code == 0, plain.all
        assert found_in(tmp_path / "plain") == {"blue", "red"}

        made = cli(
            *("refs", finder, "--refs", scenes / "references", "--out", tmp_path / "all.npz"),
        )
        assert made.code == 0, made.all
        assert made.out.startswith("blue, red, yellow in ")
        answers = []
        for name, references in (
            ("folder", scenes / "references"),
            ("file", tmp_path / "all.npz"),
        ):
            out = tmp_path / name
            answer = cli("infer", finder, *source, "--out", out, "--refs", references, "--coco")
            assert answer.code == 0, answer.all
            assert found_in(out) == {"blue", "red", "yellow"}
            answers.append(lines(out / "results.jsonl"))
        assert answers[0] == answers[1]
        content = json.loads((tmp_path / "file" / "coco.json").read_text())
        assert [each["name"] for each in content["categories"]] == ["blue", "red", "yellow"]

        one = cli(
            *("infer", finder, *source, "--out", tmp_path / "one"),
            *("--refs", scenes / "references" / "yellow", "--conf", 0.5, "--iou", 0),
        )
        assert one.code == 0, one.all
        assert found_in(tmp_path / "one") == {"yellow"}

    def test_are_followed_through_a_video(self, finder: Path, tmp_path: Path) -> None:
        from fractions import Fraction

        import numpy as np

        from engineworks.runtime.video import VideoWriter, frames

        with VideoWriter(tmp_path / "film.mp4", Fraction(10)) as writer:
            for i in range(8):
                frame = np.full((64, 96, 3), 128, np.uint8)
                frame[8:32, 8 + 4 * i : 32 + 4 * i] = 255
                writer.write(frame, i / 10)
        folder = write_references(tmp_path / "refs", ["white"])
        call = ("infer", finder, "--source", tmp_path / "film.mp4", "--refs", folder, "--jsonl")

        answer = cli(*call, "--out", tmp_path / "out", "--save-overlays")
        assert answer.code == 0, answer.all
        numbers = [
            line["objects"][0]["track"] for line in lines(tmp_path / "out" / "results.jsonl")
        ]
        assert numbers == [None, None, 1, 1, 1, 1, 1, 1]
        assert len(list(frames(tmp_path / "out" / "film.mp4"))) == 8

        assert cli(*call, "--out", tmp_path / "plain", "--no-track").code == 0
        plain = lines(tmp_path / "plain" / "results.jsonl")
        assert {line["objects"][0]["track"] for line in plain} == {None}

    def test_become_those_of_a_new_bundle(self, finder: Path, scenes: Path, tmp_path: Path) -> None:
        folder = scenes / "references" / "yellow"
        answer = cli("export", finder, "--refs", folder, "--out", tmp_path / "new")
        assert answer.code == 0, answer.all
        out = tmp_path / "out"
        call = ("infer", tmp_path / "new", "--source", scenes / "images", "--out", out, "--jsonl")
        assert cli(*call).code == 0
        assert found_in(out) == {"yellow"}

    def test_are_judged_against_those_of_the_data(
        self, finder: Path, scenes: Path, tmp_path: Path
    ) -> None:
        report = tmp_path / "metrics.json"
        call = ("eval", finder, "--data", scenes, "--json", report)
        answer = cli(*call)
        assert answer.code == 0, answer.all
        plain = json.loads(report.read_text())["metrics"]
        assert plain["map50"] == plain["map50_95"] == 1
        assert cli(*call, "--refs", scenes / "references").code == 0
        assert json.loads(report.read_text())["metrics"] == plain
        answer = cli(*call, "--refs", scenes / "references" / "red")
        refused(answer, 1, "'blue'", "blue, red, yellow")

    def test_are_looked_for_while_a_bundle_is_timed(self, finder: Path, scenes: Path) -> None:
        answer = cli(
            *("bench", finder, "--refs", scenes / "references", "--seconds", 0.02),
            *("--threads", 1, "--backend", "ort"),
        )
        assert answer.code == 0, answer.all
        assert "images to results" in answer.out

    def test_of_another_bundle_are_refused(
        self, finder: Path, scenes: Path, tmp_path: Path
    ) -> None:
        write_tiny_refdet_bundle(tmp_path / "one", size=(32, 32))
        manifest = read(tmp_path / "one").manifest
        onnx = pytest.importorskip("onnx")
        model = onnx.load(tmp_path / "one" / "encode.onnx")
        model.graph.doc_string = "another"
        onnx.save(model, tmp_path / "encode.onnx")
        files = {name: tmp_path / "one" / name for name in manifest.files}
        write(tmp_path / "two", manifest, files | {"encode.onnx": tmp_path / "encode.onnx"})
        kept = tmp_path / "kept.npz"
        folder = scenes / "references"
        assert cli("refs", tmp_path / "one", "--refs", folder, "--out", kept).code == 0
        call = ("infer", tmp_path / "two", "--source", scenes / "images", "--refs", kept)
        refused(cli(*call, "--out", tmp_path / "out"), 1, "another encoder", "cli.py refs")

    @pytest.mark.parametrize(
        "options", [("--refs", "."), ("--conf", 0.5), ("--iou", 0.5), ("--coco",)]
    )
    def test_mean_nothing_to_a_system_without_them(
        self, options: tuple[object, ...], tiny: Path, data: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        answer = cli("infer", tiny, "--source", data / "test", "--out", out, *options)
        refused(answer, 2, "noising", "leave")

    def test_need_pictures_and_a_file_that_is_called_so(
        self, finder: Path, scenes: Path, tmp_path: Path
    ) -> None:
        call = ("refs", finder, "--refs")
        refused(cli(*call, tmp_path, "--out", tmp_path / "kept.npz"), 1, "no pictures")
        folder = scenes / "references"
        refused(cli(*call, folder, "--out", tmp_path / "kept.bin"), 1, ".npz")
        refused(cli(*call, tmp_path / "lost", "--out", tmp_path / "kept.npz"), 2, "lost")
        (tmp_path / "kept.npz").write_text("mine")
        refused(cli(*call, folder, "--out", tmp_path / "kept.npz"), 2, "--exist-ok")
        assert (tmp_path / "kept.npz").read_text() == "mine"
        assert cli(*call, folder, "--out", tmp_path / "kept.npz", "--exist-ok").code == 0

    @pytest.mark.parametrize("option", ["--conf", "--iou"])
    def test_have_shares_between_zero_and_one(
        self, option: str, finder: Path, scenes: Path, tmp_path: Path
    ) -> None:
        call = ("infer", finder, "--source", scenes / "images", "--out", tmp_path / "out")
        refused(cli(*call, option, 1.5), 2, option)
