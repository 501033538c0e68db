"""What the commands say of an export's gate and verdict, and of what a border decides."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from engineworks.cli import main
from engineworks.runtime.bundle import Bundle, write
from engineworks.runtime.testing import write_parts, write_tiny_noising_bundle
from engineworks.runtime.verdict import decide

SPEED = {
    "ort": {
        "p50_ms": {"float": 4.0, "int8": 1.0},
        "stable": True,
        "int8_speedup": 4.0,
        "int8_speedup_low": 3.5,
        "int8_speedup_high": 4.5,
    }
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def reported(bundle: Bundle, out: Path, **reports: Any) -> Bundle:
    """The same bundle with other reports."""
    files = {name: bundle.path(name) for name in bundle.manifest.files}
    return write(out, bundle.manifest.model_copy(update={"reports": reports}), files)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_noising_bundle(tmp_path_factory.mktemp("tiny") / "bundle", int8=True)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"), size=(64, 64), num_good=3, num_defective=2)


class TestEval:
    def test_says_what_the_shipped_border_decides_and_warns(
        self, tiny: Bundle, parts: Path, tmp_path: Path
    ) -> None:
        border = tiny.manifest.thresholds["image"].model_copy(update={"value": 1e6})
        files = {name: tiny.path(name) for name in tiny.manifest.files}
        thresholds = {**tiny.manifest.thresholds, "image": border}
        blind = write(
            tmp_path / "b", tiny.manifest.model_copy(update={"thresholds": thresholds}), files
        )

        done = run("eval", blind.root, "--data", parts, "--json", tmp_path / "j.json")

        assert done.exit_code == 0, done.output
        assert "image 1e+06, shipped" in done.stdout
        assert "0 of 3 (0.0 to 56.1 %)" in done.stdout
        assert "warning: passes 2 of 2 labelled defects at its border" in done.stderr
        content = json.loads((tmp_path / "j.json").read_text())
        shipped, best = content["decisions"]
        assert shipped["rates"]["misses"]["count"] == 2
        assert best["rates"]["misses"]["count"] == 0
        assert content["num_pictures"] == 5 and "image_auroc" in content["metrics"]

    def test_of_good_pictures_alone_gives_the_false_rejects(
        self, tiny: Bundle, tmp_path: Path
    ) -> None:
        good = write_parts(tmp_path / "good", size=(64, 64), num_good=3, num_defective=0)

        done = run("eval", tiny.root, "--data", good)

        assert done.exit_code == 0, done.output
        assert "these labels allow no metric" in done.stdout
        assert "of 3 (" in done.stdout and "none there" in done.stdout


class TestShow:
    def test_needs_nothing_but_the_runtime(
        self, tiny: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        judged = reported(tiny, tmp_path / "b", verdict=decide({}, SPEED))
        for name in ("onnxruntime", "openvino", "faiss", "engineworks.export"):
            monkeypatch.setitem(sys.modules, name, None)

        done = run("bundle", "show", judged.root)

        assert done.exit_code == 0, done.output
        assert "verdict: ship float: accuracy was not measured" in done.stdout

    def test_tells_of_older_exports_what_they_know(self, tiny: Bundle, tmp_path: Path) -> None:
        gate = {"backend": "ort", "float": {"image_auroc": 1.0}, "passed": True, "failed": {}}
        verdict = {"ship": "int8", "backend": "ort", "pays": True, "reasons": ["fast enough"]}
        older = reported(tiny, tmp_path / "b", gate=gate, verdict=verdict)

        done = run("bundle", "show", older.root)

        assert done.exit_code == 0, done.output
        assert done.stdout.splitlines()[-2:] == ["verdict: ship int8", "  fast enough"]


class TestInfer:
    @pytest.mark.parametrize("judged", [True, False])
    def test_says_where_nobody_has_judged_what_it_runs(
        self, tiny: Bundle, parts: Path, tmp_path: Path, judged: bool
    ) -> None:
        gate = {"passed": True, "failed": {}} if judged else {}
        verdict = decide(gate, SPEED, unjudged=not judged)
        bundle = reported(tiny, tmp_path / "b", gate=gate, verdict=verdict)
        page = tmp_path / "page.html"

        done = run(
            *("--quiet", "infer", bundle.root, "--source", parts / "test" / "good"),
            *("--out", tmp_path / "o", "--report", page),
        )

        assert done.exit_code == 0, done.output
        told = "int8 is unjudged: accuracy was not measured"
        assert (told in done.stderr) != judged
        assert (told in page.read_text()) != judged


class TestExport:
    def test_takes_unjudged_for_int8_without_labels_alone(self, parts: Path, tiny: Bundle) -> None:
        plain = run("export", tiny.root, "--out", "x", "--unjudged")
        both = run(
            *("export", tiny.root, "--out", "x", "--int8", "--samples", parts / "train"),
            *("--eval", parts, "--unjudged"),
        )

        assert (plain.exit_code, both.exit_code) == (2, 2)
        assert "--unjudged has no meaning without --int8" in plain.output
        assert "labelled data judge INT8" in both.output
