"""``report``: a run or a bundle as a page."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from engineworks.cli import main
from engineworks.runtime.testing import write_tiny_noising_bundle
from engineworks.training.config import load_config
from engineworks.training.run import Run, RunInfo, write_history


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    info = RunInfo(
        system="noising",
        seed=3,
        device="cpu",
        precision="fp32",
        versions={},
        data={},
        provenance={},
        results={"fit": {"bank_rows": 123}},
    )
    Run(folder, load_config("noising"), info).save()
    write_history(folder, [{"epoch": 1, "loss": 0.25}])
    return folder


def report(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["report", *map(str, arguments)])
    return done.exit_code, done.output


class TestReport:
    def test_of_a_run_tells_results_and_epochs(self, run: Path, tmp_path: Path) -> None:
        page = tmp_path / "pages" / "run.html"
        assert report(run, "--out", page) == (0, f"{page}\n")
        html = page.read_text("utf-8")
        assert "bank_rows" in html and "123" in html and "0.2500" in html

    def test_of_a_bundle_tells_its_digest(self, tmp_path: Path) -> None:
        made = write_tiny_noising_bundle(tmp_path / "bundle")
        assert report(made.root, "--out", tmp_path / "b.html")[0] == 0
        assert made.manifest.digest in (tmp_path / "b.html").read_text("utf-8")

    def test_says_what_is_wrong(self, run: Path, tmp_path: Path) -> None:
        made = write_tiny_noising_bundle(tmp_path / "bundle").root
        (tmp_path / "no.json").write_text("{}")
        page = tmp_path / "page.html"
        for arguments, code, reason in [
            ((tmp_path,), 2, "no run.json and no manifest.json"),
            ((run, "--bench", tmp_path / "no.json"), 2, "--bench is of a bundle"),
            ((made, "--bench", tmp_path / "no.json"), 1, "no report of bench"),
            ((made, "--bench", tmp_path / "none.json"), 1, "cannot be read"),
        ]:
            got, told = report(*arguments, "--out", page)
            assert (got, page.exists()) == (code, False) and reason in told, told
        (run / "metrics.csv").write_bytes(b"epoch\n\xff")
        got, told = report(run, "--out", page)
        assert got == 1 and "metrics.csv is damaged" in told
