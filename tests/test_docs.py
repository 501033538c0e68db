"""The documentation as a site: it builds without a warning, and every link and anchor holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import engineworks

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as ``make docs`` does; Sphinx warns of links and anchors without a target."""
    folder = tmp_path_factory.mktemp("site")
    strict = ("--quiet", "--fail-on-warning", "--keep-going")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *strict, "-d", folder / "cache", "docs", folder / "html"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "html"


@pytest.mark.train
@pytest.mark.slow
class TestTheSite:
    def test_has_a_page_for_every_page(self, site: Path) -> None:
        pages = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
        assert len(pages) >= 20
        assert [page for page in pages if not (site / page.with_suffix(".html")).is_file()] == []

    def test_explains_every_public_name(self, site: Path) -> None:
        page = (site / "reference.html").read_text(encoding="utf-8")
        modules = {"errors", "testing"}
        wanted = [f'id="engineworks.{name}"' for name in {*engineworks.__all__} - modules]
        assert [anchor for anchor in wanted if anchor not in page] == []

    def test_explains_every_command(self, site: Path) -> None:
        from engineworks.cli import main

        page = (site / "cli.html").read_text(encoding="utf-8")
        assert [name for name in main.commands if f'id="engineworks-{name}"' not in page] == []
