from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engineworks.runtime.bench import Row, Timing, Turn, environment
from engineworks.runtime.compare import compare, render
from engineworks.runtime.errors import InputError


def report(path: Path, *rows: tuple[str, int, float], **changed: Any) -> Path:
    """A report as ``bench --json`` writes it; rows are (name, batch, milliseconds)."""
    content = {
        "environment": environment(threads=2) | changed.pop("environment", {}),
        "bundle": "somewhere",
        "bundle_digest": "d" * 64,
        "inputs": {"count": 8, "shapes": ["(8, 8, 3)"], "sha256": "a" * 64},
        "rows": [
            Row(name, "int8", batch, 2, "network", Timing((Turn((ms,) * 20, 0.0),))).to_json()
            for name, batch, ms in rows
        ],
        **changed,
    }
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return report(tmp_path / "A.json", ("ort", 1, 12.0), ("openvino", 1, 6.0))


class TestTwoReports:
    def test_are_matched_by_what_was_measured(self, before: Path, tmp_path: Path) -> None:
        after = report(tmp_path / "B.json", ("openvino", 1, 4.0), ("ort", 1, 24.0), ("ort", 8, 9.0))
        found = compare(before, after)
        assert {pair.first.name: pair.ratio for pair in found.pairs} == {
            "ort": pytest.approx(0.5),
            "openvino": pytest.approx(1.5),
        }
        assert found.only == ((), ("ort int8, network, batch 8",))
        assert found.differences == {}

    def test_tell_what_else_differs(self, before: Path, tmp_path: Path) -> None:
        other = {"cpu": "Another CPU", "gpu": {"name": "H200"}, "packages": {"numpy": "9.9"}}
        after = report(
            tmp_path / "B.json", ("ort", 1, 1.0), environment=other, bundle_digest="e" * 64
        )
        found = compare(before, after).differences
        assert found["cpu"][1] == "Another CPU" and found["gpu"][1] == '{"name": "H200"}'
        assert found["numpy"][1] == "9.9" and found["bundle"] == ("d" * 12, "e" * 12)
        assert "threads" not in found and "images" not in found

    def test_tell_which_figures_were_not_stable(self, before: Path, tmp_path: Path) -> None:
        after = report(tmp_path / "B.json", ("ort", 1, 12.0))
        content = json.loads(after.read_text())
        content["rows"][0]["verdict"] = "others busy"
        after.write_text(json.dumps(content))
        (pair,) = compare(before, after).pairs
        assert pair.doubts == "B: others busy"

    def test_become_a_table(self, before: Path, tmp_path: Path) -> None:
        after = report(tmp_path / "B.json", ("ort", 1, 4.0), bundle_digest="e" * 64)
        text = render(compare(before, after))
        (line,) = [line for line in text.splitlines() if "ort int8" in line]
        assert [cell.strip() for cell in line.split("│")[1:-1]] == [
            *("network", "1", "ort int8", "12.00", "4.00", "3.00", "")
        ]
        assert "only in A: openvino int8, network, batch 1" in text
        assert "what else differs: bundle: dddddddddddd / eeeeeeeeeeee" in text

    def test_without_a_common_row_are_refused(self, before: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no row in common") as caught:
            compare(before, report(tmp_path / "B.json", ("ort", 2, 1.0)))
        assert caught.value.fix

    @pytest.mark.parametrize("content", ["", "[]", '{"rows": []}', '{"rows": [{"p50_ms": 1}]}'])
    def test_of_which_one_is_something_else_are_refused_by_name(
        self, before: Path, tmp_path: Path, content: str
    ) -> None:
        other = tmp_path / "other.json"
        other.write_text(content)
        with pytest.raises(InputError, match=r"other\.json is no report of bench") as caught:
            compare(before, other)
        assert "--json" in str(caught.value.fix)
        with pytest.raises(InputError, match=r"none\.json cannot be read"):
            compare(tmp_path / "none.json", before)
