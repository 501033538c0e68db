"""docs/add-a-system.md, followed to the letter in a copy of the tree."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import python

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "add-a-system.md"
TREE = (
    *("engineworks", "runtime", "calibration", "batch", "training", "export"),
    *("cli.py", "setup.cfg"),
)


def blocks(before: str, language: str) -> list[tuple[tuple[str, ...], str]]:
    """The page's code under lines such as ``before``: what that line names, and the code."""
    pattern = rf"^{before}:\n\n```{language}\n(.*?)^```$"
    found = re.finditer(pattern, PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return [(match.groups()[:-1], match.groups()[-1]) for match in found]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with what the page adds to it."""
    copy = tmp_path_factory.mktemp("tree")
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.tmp")
            shutil.copytree(source, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, copy / name)
    for (name,), code in blocks("File `([^`]+)`", r"(?:python|yaml)"):
        assert not (copy / name).exists()
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(code, encoding="utf-8")
    for (table, name), line in blocks("Line in the table `([^`]+)` of `([^`]+)`", "text"):
        text = (copy / name).read_text(encoding="utf-8")
        start = re.search(rf"^{table}: .*{{$", text, re.M)
        assert start is not None, (table, name)
        end = text.index("}", start.end())
        (copy / name).write_text(text[:end] + line + text[end:], encoding="utf-8")
    return copy


@pytest.fixture(scope="module")
def said(tree: Path) -> dict[str, str]:
    """Command -> what it printed; all of the page's commands, in their order."""
    ((_, console),) = blocks("Calibration, .*? need no code of the system", "console")
    answers = {}
    for line in console.splitlines():
        words = shlex.split(line.removeprefix("$ "))
        assert words[:2] == ["python", "cli.py"]
        done = python(*words[1:], cwd=tree)
        assert done.code == 0, f"{line}\n{done.all}"
        answers[" ".join(words[2:4])] = done.out
    return answers


def test_the_page_adds_every_file_and_every_line() -> None:
    files = {name for (name,), _ in blocks("File `([^`]+)`", r"(?:python|yaml)")}
    stages = {f"{stage}/systems/tint.py" for stage in ("runtime", "export")}
    training = ("__init__", "config", "data", "model", "task", "sample", "eager")
    assert files == {
        *stages,
        "training/systems/tint/default.yaml",
        *(f"training/systems/tint/{name}.py" for name in training),
    }
    lines = blocks("Line in the table `([^`]+)` of `([^`]+)`", "text")
    assert {table for (table, _), _ in lines} == {"SYSTEMS", "TASKS", "RECIPES"}


@pytest.mark.train
@pytest.mark.slow
class TestTheSixthSystem:
    def test_goes_through_every_stage(self, tree: Path, said: dict[str, str]) -> None:
        shown = said["bundle show"]
        assert shown.startswith("tint, schema")
        assert "int8-u8" in shown and "verdict: ship" in shown
        metrics = json.loads((tree / "metrics.json").read_text())["metrics"]
        assert metrics["top1"] == 1.0  # six colours that nothing could confuse
        lines = (tree / "results" / "results.jsonl").read_text().splitlines()
        assert len(lines) == 24

    def test_passes_mypy_strict(self, tree: Path) -> None:
        files = [f"engineworks/{path.relative_to(tree)}" for path in tree.rglob("*tint*.py")]
        files += [
            f"engineworks/{path.relative_to(tree)}"
            for path in (tree / "training/systems/tint").glob("*.py")
        ]
        if (ROOT / ".mypy_cache").is_dir():  # what `make lint` has found out of the other files
            shutil.copytree(ROOT / ".mypy_cache", tree / ".mypy_cache")
        done = subprocess.run(
            [sys.executable, "-m", "mypy", "--config-file", "setup.cfg", *files],
            cwd=tree,
            capture_output=True,
            text=True,
            check=False,
        )
        assert len(files) == 9
        assert done.returncode == 0, done.stdout

    def test_shows_its_metric_and_its_rivals_in_the_benchmark(
        self, tree: Path, said: dict[str, str]
    ) -> None:
        assert "top1" in said["bench int8"]
        rows = json.loads((tree / "bench.json").read_text())["rows"]
        assert {"eager channels_last", "ort"} <= {row["name"] for row in rows}

    def test_is_told_where_it_is_missing(self, tree: Path) -> None:
        """The copy is what runs: the tree that the tests are from knows no such system."""
        command = [sys.executable, "cli.py", "check", "tint", "--data", "."]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "there is no system 'tint'" in done.stderr
