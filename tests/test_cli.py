"""The commands as a user calls them: what they write, what they say, and their exit codes."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engineworks.commands.printing import Progress
from engineworks.runtime import images
from engineworks.runtime.bundle import MANIFEST_NAME, Bundle, read, write
from engineworks.runtime.testing import (
    write_parts,
    write_tiny_noising_bundle,
)
from tests.command import (
    Answer,
    cli,
    refused,
)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("data"), size=(48, 64), num_train=10)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve frames of drawn parts."""
    from engineworks.runtime.video import VideoWriter

    path = tmp_path_factory.mktemp("video") / "parts.mp4"
    parts = write_parts(path.parent / "parts", size=(64, 64), num_train=12)
    with VideoWriter(path, 10) as writer:
        for i, picture in enumerate(sorted((parts / "train" / "good").iterdir())):
            writer.write(images.read(picture), i / 10)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that no torch was needed for; read-only."""
    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    write_tiny_noising_bundle(folder, int8=True)
    return folder


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "bundle"))


def changed(bundle: Bundle, out: Path, **update: Any) -> Bundle:
    """The same bundle with another manifest."""
    files = {name: bundle.path(name) for name in bundle.manifest.files}
    return write(out, bundle.manifest.model_copy(update=update), files)


@dataclass(frozen=True)
class Trained:
    run: Path
    floats: Path
    bundle: Path
    said: dict[str, Answer]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """train, export, export --int8: each command once, on random weights."""
    root = tmp_path_factory.mktemp("trained")
    run, floats, bundle = root / "run", root / "float", root / "int8"
    settings = [
        "backbone.weights=none",
        "backbone.name=resnet10t",
        "backbone.stages=[1, 2]",
        "preprocess.size=[64, 64]",
        "fit.max_rows=100",
    ]
    chosen = [part for setting in settings for part in ("--set", setting)]
    said = {
        "train": cli("train", "noising", "--data", data, "--out", run, *chosen),
        "export": cli("export", run, "--out", floats),
        "int8": cli(
            *("export", floats, "--out", bundle, "--int8", "--samples", data / "train"),
            *("--num-samples", 4, "--method", "minmax", "--eval", data, "--seed", 3),
            *("--seconds", 0.1),
        ),
    }
    for name, answer in said.items():
        assert answer.code == 0, f"{name}: {answer.all}"
    return Trained(run, floats, bundle, said)


@pytest.mark.train
class TestTrainAndExport:
    def test_training_prints_what_each_signal_earns_and_names_the_run(
        self, trained: Trained
    ) -> None:
        said = trained.said["train"]
        for row in ("distance", "distance + influence", "shipped", "image_auroc", "false rejects"):
            assert row in said.out
        assert said.out.splitlines()[-1] == str(trained.run)

    def test_a_run_holds_the_merged_configuration_metrics_and_weights(
        self, trained: Trained
    ) -> None:
        config = (trained.run / "config.yaml").read_text()
        assert "max_rows: 100" in config  # from --set
        assert "workers: 0" in config  # from the defaults
        for name in ("metrics.csv", "weights/best.safetensors", "weights/last.safetensors"):
            assert (trained.run / name).is_file()
        assert list(trained.run.glob("events.out.tfevents.*"))

    def test_progress_is_a_line_per_epoch_where_stderr_is_no_terminal(
        self, trained: Trained
    ) -> None:
        assert re.fullmatch(r"epoch 1/1, \d+ s\n", trained.said["train"].err)

    def test_what_takes_long_is_told_once_a_minute_where_stderr_is_no_terminal(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        clock = iter([0.0, 59.0, 61.0, 120.0, 121.0, 999.0])
        monkeypatch.setattr("time.monotonic", lambda: next(clock))
        show = Progress._lines()
        for done in range(5):
            show("coreset", done, 0 if done == 4 else 9)
        assert capsys.readouterr().err == "coreset: 1 of 9\ncoreset: 3 of 9\ncoreset: 4\n"

    def test_a_run_becomes_a_float_bundle_that_was_compared_with_torch(
        self, trained: Trained
    ) -> None:
        manifest = read(trained.floats).manifest
        assert list(manifest.graphs["features"].variants) == ["float"]
        parity = manifest.reports["parity"]["torch-float"]["features"]["features"]
        assert parity["max_rel"] <= 1e-4  # the recipe's tolerance

    def test_a_float_bundle_becomes_one_with_int8_and_a_measured_verdict(
        self, trained: Trained
    ) -> None:
        manifest = read(trained.bundle).manifest
        assert set(manifest.graphs["features"].variants) == {"float", "int8", "int8-u8"}
        reports = manifest.reports
        assert set(reports["gate"]["drop"]) == {"image_auroc", "pixel_auroc"}
        assert reports["calibration"]["method"] == "minmax"
        assert reports["verdict"]["ship"] in ("int8", "float")
        assert "verdict: ship" in trained.said["int8"].err
        assert "of 8 pictures, 95 % " in trained.said["int8"].err
        assert "float decisions" in trained.said["int8"].out

    def test_the_verdict_is_what_show_tells(self, trained: Trained) -> None:
        answer = cli("bundle", "show", trained.bundle)
        assert answer.code == 0
        assert f"verdict: ship {read(trained.bundle).manifest.reports['verdict']['ship']}" in (
            answer.out
        )

    def test_a_second_training_into_the_same_folder_is_refused(
        self, trained: Trained, data: Path
    ) -> None:
        answer = cli("train", "noising", "--data", data, "--out", trained.run)
        assert answer.code == 1
        assert "--resume" in answer.err

    def test_a_failed_gate_still_writes_the_bundle_but_exits_1_with_fail_on_drop(
        self, trained: Trained, data: Path, tmp_path: Path
    ) -> None:
        # no net passes a gate that asks for a gain of 1
        strict = changed(read(trained.floats), tmp_path / "strict", gate={"image_auroc": -1.0})
        answer = cli(
            *("export", strict.root, "--out", tmp_path / "out", "--int8", "--fail-on-drop"),
            *("--samples", data / "train", "--num-samples", 2, "--method", "minmax"),
            *("--eval", data, "--seconds", 0.1),
        )
        assert answer.code == 1
        assert "lost more than allowed" in answer.err
        assert read(tmp_path / "out").manifest.reports["verdict"]["ship"] == "float"


class TestInfer:
    def test_a_folder_gives_a_table_json_lines_and_overlays(
        self, tiny: Path, data: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        answer = cli(
            *("infer", tiny, "--source", data / "test", "--out", out),
            *("--jsonl", "--save-overlays", "--batch", 3),
        )
        assert answer.code == 0, answer.all
        assert answer.out.startswith("8 done, 0 failed")
        records = lines(out / "results.jsonl")
        assert [Path(record["source"]).parent.name for record in records] == (
            ["good"] * 4 + ["scratch"] * 4
        )
        assert {"label", "score", "threshold", "anomalous_area", "width", "height"} <= set(
            records[0]
        )
        with (out / "results.csv").open() as file:
            assert [float(row["score"]) for row in csv.DictReader(file)] == [
                record["score"] for record in records
            ]
        assert (out / "overview.jpg").is_file()
        overlays = {p.relative_to(out / "overlays").as_posix() for p in out.rglob("*.png")}
        assert overlays == {f"{kind}/{i:03d}.png" for kind in ("good", "scratch") for i in range(4)}

    def test_a_glob_and_a_list_give_the_same_answers_as_the_folder(
        self, tiny: Path, data: Path, tmp_path: Path
    ) -> None:
        folder = data / "test" / "scratch"
        listed = tmp_path / "list.txt"
        listed.write_text("".join(f"{path}\n" for path in sorted(folder.iterdir())))
        answers = []
        for name, source in (("f", folder), ("g", f"{folder}/*.png"), ("l", listed)):
            answer = cli("infer", tiny, "--source", source, "--out", tmp_path / name, "--jsonl")
            assert answer.code == 0, answer.all
            answers.append(lines(tmp_path / name / "results.jsonl"))
        assert answers[0] == answers[1] == answers[2]

    def test_a_video_becomes_an_annotated_video(
        self, tiny: Path, video: Path, tmp_path: Path
    ) -> None:
        from engineworks.runtime.video import frames

        out = tmp_path / "out"
        answer = cli(
            *("infer", tiny, "--source", video, "--out", out, "--jsonl", "--save-overlays"),
        )
        assert answer.code == 0, answer.all
        assert [record["frame"] for record in lines(out / "results.jsonl")] == list(range(12))
        written = list(frames(str(out / "parts.mp4")))
        assert len(written) == 12
        assert written[0].image.shape[1] > 64  # panels beside the picture

    @pytest.mark.parametrize("backend", ["ort", "openvino"])
    @pytest.mark.parametrize("precision", ["float", "int8"])
    def test_each_backend_and_precision_runs_when_asked_for(
        self, backend: str, precision: str, tiny: Path, data: Path, tmp_path: Path
    ) -> None:
        answer = cli(
            *("infer", tiny, "--source", data / "test", "--out", tmp_path / "out"),
            *("--backend", backend, "--precision", precision, "--threads", 1),
        )
        assert answer.code == 0, answer.all
        assert f"{backend}, {precision}" in answer.err

    def test_a_truncated_picture_is_skipped_and_reported_and_the_others_are_done(
        self, tiny: Path, data: Path, tmp_path: Path
    ) -> None:
        folder = Path(shutil.copytree(data / "test" / "good", tmp_path / "pictures"))
        whole = (folder / "001.png").read_bytes()
        (folder / "001.png").write_bytes(whole[: len(whole) // 2])
        out = tmp_path / "out"
        answer = cli("infer", tiny, "--source", folder, "--out", out, "--jsonl")
        assert answer.code == 1
        assert "skipped" in answer.err
        assert "001.png" in answer.err
        assert answer.out.startswith("3 done, 1 failed")
        records = lines(out / "results.jsonl")
        assert ["error" in record for record in records] == [False, True, False, False]

    def test_each_picture_is_named_with_its_result(
        self, tiny: Path, data: Path, tmp_path: Path
    ) -> None:
        folder = data / "test" / "scratch"
        answer = cli("infer", tiny, "--source", folder, "--out", tmp_path / "out")
        said = [line for line in answer.err.splitlines() if ".png: " in line]
        assert [line.split(": ")[0] for line in said] == [
            str(folder / f"{i:03d}.png") for i in range(4)
        ]
        assert all(": anomalous, score " in line for line in said)

    def test_quiet_says_nothing_on_stderr(self, tiny: Path, data: Path, tmp_path: Path) -> None:
        source = data / "test" / "good" / "000.png"
        answer = cli("--quiet", "infer", tiny, "--source", source, "--out", tmp_path / "out")
        assert (answer.code, answer.err) == (0, "")

    def test_full_folders_are_left_alone_without_exist_ok(
        self, tiny: Path, data: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "mine.txt").write_text("keep")
        call = ("infer", tiny, "--source", data / "test" / "good" / "000.png", "--out", tmp_path)
        refused = cli(*call)
        assert refused.code == 2
        assert "--exist-ok" in refused.err
        assert cli(*call, "--exist-ok").code == 0
        assert (tmp_path / "mine.txt").read_text() == "keep"


class TestEvalAndBench:
    def test_eval_prints_the_metrics_and_writes_the_same_as_json(
        self, tiny: Path, data: Path, tmp_path: Path
    ) -> None:
        report = tmp_path / "metrics.json"
        answer = cli("eval", tiny, "--data", data, "--json", report, "--backend", "ort")
        assert answer.code == 0, answer.all
        content = json.loads(report.read_text())
        assert content["backend"] == "ort"
        for name in ("image_auroc", "pixel_auroc", "aupro"):
            assert 0 <= content["metrics"][name] <= 1
            assert f"{content['metrics'][name]:.4f}" in answer.out

    def test_bench_gives_every_precision_and_batch_with_what_the_clock_covers(
        self, tiny: Path, data: Path, tmp_path: Path
    ) -> None:
        report = tmp_path / "bench.json"
        answer = cli(
            *(
                "bench",
                tiny,
                "--seconds",
                0.05,
                "--batch",
                "1,2",
                "--threads",
                1,
                "--backend",
                "ort",
            ),
            *("--eval", data, "--source", data / "test", "--json", report),
        )
        assert answer.code == 0, answer.all
        content = json.loads(report.read_text())
        found = {(r["name"], r["precision"], r["batch"], r["covers"]) for r in content["rows"]}
        assert found == {
            (name, precision, batch, covers)
            for name, precision in (("ort", "float"), ("ort", "int8"))
            for batch in (1, 2)
            for covers in ("network", "images to results")
        }
        compared = cli("bench", "--compare", report, report)
        assert compared.code == 0, compared.all
        assert len([line for line in compared.out.splitlines() if "ort" in line]) == len(found)
        row = content["rows"][0]
        assert row["p50_ms"] <= row["p90_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert "image_auroc" in row["accuracy"]
        assert content["bundle_digest"] == read(tiny).manifest.digest
        assert content["inputs"]["count"] == 8
        assert content["environment"]["threads"] == 1
        assert "p50 ms" in answer.out

    def test_bench_compares_two_reports_or_needs_a_bundle(self, tmp_path: Path) -> None:
        refused(cli("bench"), 2, "--compare A.json B.json")
        (tmp_path / "A.json").write_text("{}")
        refused(cli("bench", "--compare", tmp_path / "A.json", tmp_path / "B.json"), 1, "no report")


class TestDoctor:
    def test_it_names_versions_processor_backends_and_what_to_install(self) -> None:
        answer = cli("doctor")
        assert answer.code == 0, answer.all
        assert "engineworks 0." in answer.out
        assert "cores" in answer.out
        for backend in ("tensorrt", "openvino", "ort"):
            assert f"backend {backend}" in answer.out


class TestAThreshold:
    def test_can_be_moved_without_exporting_again_and_changes_verdicts(
        self, copy: Path, data: Path, tmp_path: Path
    ) -> None:
        labels = {}
        for value in (-1e6, 1e6):
            before = {p.name: p.read_bytes() for p in copy.iterdir() if p.name != MANIFEST_NAME}
            assert cli("bundle", "set-threshold", copy, "image", "--", value).code == 0
            assert before == {name: (copy / name).read_bytes() for name in before}
            out = tmp_path / f"{value}"
            answer = cli("infer", copy, "--source", data / "test", "--out", out, "--jsonl")
            assert answer.code == 0, answer.all
            labels[value] = {record["label"] for record in lines(out / "results.jsonl")}
        assert labels == {-1e6: {"anomalous"}, 1e6: {"normal"}}
        assert read(copy).manifest.thresholds["image"].source == "set by hand"

    def test_follows_another_budget_without_pictures(self, copy: Path) -> None:
        values = []
        for budget in (0.02, 0.2):
            answer = cli("bundle", "set-threshold", copy, "image", "--budget", budget)
            assert answer.code == 0, answer.all
            values.append(read(copy).manifest.thresholds["image"].value)
        assert values[0] > values[1]
        answer = cli("bundle", "set-threshold", copy, "image", 1, "--budget", 0.1)
        assert answer.code == 2 and "VALUE or --budget" in answer.err

    def test_of_another_name_is_an_error_that_lists_the_names(self, copy: Path) -> None:
        answer = cli("bundle", "set-threshold", copy, "imge", 1)
        assert answer.code == 1
        assert "image, pixel" in answer.err


class TestABank:
    def test_grows_by_new_normal_images_into_a_new_bundle(
        self, tiny: Path, data: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "grown"
        answer = cli(
            *("bank", "add", tiny, "--images", data / "train", "--out", out, "--max-rows", 7)
        )
        assert answer.code == 0, answer.all
        assert answer.out.startswith("7 rows added")
        old, new = (read(folder).manifest.files["bank.faiss"].size_bytes for folder in (tiny, out))
        assert new - old == 7 * 16 * 4  # rows of 16 float32

    def test_does_not_replace_a_bundle_unasked(self, tiny: Path, copy: Path, data: Path) -> None:
        answer = cli("bank", "add", tiny, "--images", data / "train", "--out", copy)
        assert answer.code == 1
        assert "--exist-ok" in answer.err


class TestSample:
    def test_does_not_draw_into_a_folder_that_holds_something(self, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("keep")
        answer = cli("sample", "noising", "--out", tmp_path)
        assert answer.code == 2
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
