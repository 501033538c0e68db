"""The order of an export's stages, what is refused early, and what is left where one fails."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from engineworks.export import gate, int8, pipeline, verdict
from engineworks.export.config import ExportConfig
from engineworks.export.job import Job
from engineworks.export.pipeline import STAGES, Stage, export
from engineworks.runtime.bundle import Bundle, read
from engineworks.runtime.errors import BackendError, GateError, UsageError
from engineworks.runtime.testing import write_parts, write_tiny_noising_bundle


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"), size=(64, 64))


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_noising_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


def int8_of(parts: Path, **changes: Any) -> ExportConfig:
    options: dict[str, Any] = {"samples": parts / "train", "num_samples": 2, "method": "minmax"}
    return ExportConfig(int8=True, threads=1, seconds=0.1, **{**options, **changes})


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the stages that run; none of them but the first does anything."""
    names: list[str] = []

    def noted(stage: Stage) -> Stage:
        def run(job: Job) -> None:
            names.append(stage.name)
            if stage.name == "trace":
                stage.run(job)

        return Stage(stage.name, stage.wanted, run)

    monkeypatch.setattr(pipeline, "STAGES", tuple(map(noted, STAGES)))
    return names


class TestTheStages:
    def test_run_in_one_order_whatever_is_wanted(
        self, floats: Bundle, parts: Path, tmp_path: Path, ran: list[str]
    ) -> None:
        everything = int8_of(
            parts,
            references=parts,
            sensitivity=True,
            evaluation=parts,
            halves=("fp16",),
            plans=("int8",),
        )
        export(floats, tmp_path / "out", everything)
        assert ran == [stage.name for stage in STAGES]
        # plans are built of what the gate has left
        assert ran.index("gate") < ran.index("verdict") < ran.index("plans")

    @pytest.mark.parametrize(
        ("config", "names"),
        [
            (ExportConfig(halves=("bf16",)), ["trace", "16 bits"]),
            (ExportConfig(plans=("float",)), ["trace", "shapes of plans", "plans"]),
            # a plan of 16 bits is built of the graph of 16 bits
            (ExportConfig(plans=("fp16",)), ["trace", "shapes of plans", "16 bits", "plans"]),
        ],
    )
    def test_are_those_that_are_wanted(
        self, floats: Bundle, tmp_path: Path, ran: list[str], config: ExportConfig, names: list[str]
    ) -> None:
        export(floats, tmp_path / "out", config)
        assert ran == names

    def test_without_labelled_data_have_no_gate(
        self, floats: Bundle, parts: Path, tmp_path: Path, ran: list[str]
    ) -> None:
        export(floats, tmp_path / "out", int8_of(parts))
        assert ran == ["trace", "calibrate", "quantize", "verdict"]


class TestWhatCannotBe:
    def test_plans_are_refused_before_the_long_work(
        self, floats: Bundle, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def worked(*_args: object, **_options: object) -> None:
            pytest.fail("ranges were measured for plans that cannot be built")

        monkeypatch.setattr(int8.calibration, "measure", worked)
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
        with pytest.raises(BackendError, match="'tensorrt' is not installed"):
            export(floats, tmp_path / "out", int8_of(parts, plans=("int8",)))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("source", "config", "said"),
        [
            ("nowhere", ExportConfig(), "there is no run or bundle"),
            ("nowhere", ExportConfig(options={"stages": "2"}), "--stages is for backbone:NAME"),
            ("nowhere", ExportConfig(timing_cache=Path()), "have no meaning without --plan"),
            ("nowhere", ExportConfig(unjudged=True), "has no meaning without --int8"),
            ("nowhere", ExportConfig(samples=Path()), "has no meaning without --int8"),
        ],
    )
    def test_is_a_misuse_that_leaves_nothing(
        self, tmp_path: Path, source: str, config: ExportConfig, said: str
    ) -> None:
        with pytest.raises(UsageError, match=said):
            export(tmp_path / source, tmp_path / "out", config)
        assert list(tmp_path.iterdir()) == []

    def test_a_failed_gate_is_told_after_all_that_was_wanted_is_written(
        self, floats: Bundle, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failed = {"passed": False, "failed": {"image_auroc": 0.1}, "not_judged": []}
        monkeypatch.setattr(gate, "judge", lambda *_args, **_options: failed)
        quick = dict.fromkeys(("int8_speedup", "int8_speedup_low", "int8_speedup_high"), 2.0)
        speed = {"ort": {"p50_ms": {}, "stable": True, **quick}}
        monkeypatch.setattr(verdict, "_speed", lambda *_: speed)
        config = int8_of(parts, evaluation=parts, fail_on_drop=True, halves=("fp16",))
        with pytest.raises(GateError, match="lost more than allowed") as caught:
            export(floats, tmp_path / "out", config)
        made = read(tmp_path / "out").manifest
        assert {"int8", "fp16"} <= set(made.graphs["features"].variants)
        assert made.reports["verdict"]["ship"] == "float"
        assert str(tmp_path / "out") in str(caught.value.fix)
