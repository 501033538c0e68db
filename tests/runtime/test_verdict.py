from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engineworks.runtime.bundle import read
from engineworks.runtime.testing import write_tiny_noising_bundle
from engineworks.runtime.verdict import decide, describe, unjudged


def speed(low: float, *, bf16: float | None = None, stable: bool = True) -> dict[str, Any]:
    p50 = {"float": 4.0, "int8": 1.0}
    return {
        "p50_ms": p50 if bf16 is None else {**p50, "bf16": bf16},
        "stable": stable,
        "int8_speedup": low + 0.5,
        "int8_speedup_low": low,
        "int8_speedup_high": low + 1,
    }


PASSED = {"passed": True, "failed": {}}
FAILED = {"passed": False, "failed": {"image_auroc": 0.0123}}


class TestTheVerdict:
    @pytest.mark.parametrize(
        ("gate", "low", "ship"),
        [
            (PASSED, 3.0, "int8"),
            (FAILED, 3.0, "float"),
            ({}, 3.0, "float"),
            (PASSED, 1.04, "float"),
            (FAILED, 1.04, "float"),
            ({}, 1.04, "float"),
            (PASSED, 1.05, "int8"),
        ],
        ids=[
            "good and fast",
            "bad and fast",
            "unmeasured and fast",
            "good, hardly faster",
            "bad, hardly faster",
            "unmeasured, hardly faster",
            "good, at the border",
        ],
    )
    def test_ships_int8_where_it_pays_and_passed(
        self, gate: dict[str, Any], low: float, ship: str
    ) -> None:
        verdict = decide(gate, {"openvino": speed(low)})

        assert verdict["ship"] == ship
        assert verdict["pays"] == (low >= 1.05)
        assert verdict["backend"] == "openvino"

    def test_goes_by_the_backend_that_auto_takes(self) -> None:
        slow, fast = speed(0.8), speed(5.0)

        assert decide(PASSED, {"openvino": slow, "ort": fast})["ship"] == "float"
        assert decide(PASSED, {"openvino": fast, "ort": slow})["ship"] == "int8"

    def test_gives_its_reasons(self) -> None:
        found = {"openvino": speed(0.5, bf16=1.5, stable=False), "ort": speed(3.0)}

        lines = describe(decide(FAILED, found))

        assert lines == [
            "verdict: ship float",
            "  openvino: INT8 is 1.00x as fast as float (95 % interval 0.50 to 1.50)",
            "  openvino: float 4.00 ms, int8 1.00 ms, bf16 1.50 ms",
            "  ort: INT8 is 3.50x as fast as float (95 % interval 3.00 to 4.00)",
            "  INT8 does not pay here with openvino",
            "  the machine was not quiet while this was timed",
            "  the task's metrics dropped too much: image_auroc by 0.0123",
        ]

    def test_of_nothing_that_was_judged_says_so_and_how_to_get_on(self) -> None:
        lines = describe(decide({}, {"ort": speed(3.0)}))

        assert lines[0] == "verdict: ship float: accuracy was not measured"
        assert "--eval DIR" in lines[-1] and "--unjudged" in lines[-1]

    def test_ships_int8_unjudged_where_it_pays_and_somebody_says_so(self) -> None:
        fast, slow = (decide({}, {"ort": speed(low)}, unjudged=True) for low in (3.0, 0.8))

        assert describe(fast)[0] == "verdict: ship int8: accuracy was not measured"
        assert (fast["unjudged"], slow["ship"]) == (True, "float")

    def test_warns_of_what_the_precision_that_ships_decides(self) -> None:
        warnings = {"float": ["passes 3 of 4"], "int8": ["passes 4 of 4"]}

        passed = decide({**PASSED, "warnings": warnings}, {"ort": speed(3.0)})
        failed = decide({**FAILED, "warnings": warnings}, {"ort": speed(3.0)})

        assert describe(passed)[1] == "  warning: passes 4 of 4"
        assert describe(failed)[1] == "  warning: passes 3 of 4"

    def test_of_an_older_version_is_told_as_well(self) -> None:
        assert describe({"ship": "int8", "backend": "ort", "pays": True, "reasons": ["fast"]}) == [
            "verdict: ship int8",
            "  fast",
        ]


def test_whoever_runs_int8_that_nobody_judged_is_told(tmp_path: Path) -> None:
    manifest = write_tiny_noising_bundle(tmp_path / "bundle", int8=True).manifest
    judged = manifest.model_copy(update={"reports": {"gate": PASSED}})

    assert "accuracy was not measured" in str(unjudged(manifest, "int8"))
    assert unjudged(manifest, "int8-bf16") and unjudged(manifest, "float") is None
    assert unjudged(judged, "int8") is None
    assert read(tmp_path / "bundle").manifest == manifest
