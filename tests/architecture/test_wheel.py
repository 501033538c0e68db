"""The wheel, installed from the package index where there is no torch, runs a bundle.

This proves that the base install with the extra ``cpu`` is enough for ``infer`` and ``eval``, that
the wheel holds every module and default, and that the command is on the path. The bundle comes
from this tree; the code that runs it is the wheel's alone.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from engineworks.runtime.testing import write_parts, write_tiny_noising_bundle

ROOT = Path(__file__).parents[2]
SOURCES = ("runtime", "calibration", "batch", "training", "export", "cli.py")
FACE = "engineworks"  # the one name that the wheel installs; its links lead to the sources
FILES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # a copy, because a build leaves its folders behind
    tree = tmp_path_factory.mktemp("tree")
    for name in (FACE, *SOURCES, *FILES):
        source = ROOT / name
        if source.is_dir():
            unwanted = shutil.ignore_patterns("__pycache__", "*.tmp")
            shutil.copytree(source, tree / name, symlinks=True, ignore=unwanted)
        else:
            shutil.copy(source, tree / name)
    # the builder of this environment: a wheel needs nothing else from the index
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", cwd=tree)
    (built,) = (tree / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of a fresh environment with the wheel in it; deleted again, it is large."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "venv", cwd=folder)
    # a package of somebody else's, whose top-level name is that of a folder here
    write(folder / "other/runtime/__init__.py", 'WHOSE = "somebody else\'s"\n')
    write(folder / "other/setup.cfg", "[metadata]\nname = other\n[options]\npackages = runtime\n")
    write(folder / "other/pyproject.toml", (ROOT / "pyproject.toml").read_text())
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation")
    run(*build, "--outdir", folder, folder / "other", cwd=folder)
    (other,) = folder.glob("other-*.whl")
    install = ("-m", "pip", "install", "-q", other, f"{wheel}[cpu]")
    run(folder / "venv/bin/python", *install, cwd=folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
class TestTheWheel:
    def test_holds_every_module_and_default_and_no_test(self, wheel: Path) -> None:
        inside = set(zipfile.ZipFile(wheel).namelist())
        wanted = {
            f"{FACE}/{path.relative_to(ROOT).as_posix()}"
            for name in SOURCES
            for path in ((ROOT / name).rglob("*") if (ROOT / name).is_dir() else [ROOT / name])
            if path.suffix in (".py", ".yaml", ".html")
        }
        assert wanted <= inside
        assert f"{FACE}/py.typed" in inside
        tops = {name.split("/")[0] for name in inside}
        assert {top for top in tops if not top.endswith(".dist-info")} == {FACE}

    def test_runs_a_bundle_where_there_is_no_torch(self, elsewhere: Path, tmp_path: Path) -> None:
        python = elsewhere / "venv/bin/python"
        probe = "import importlib.util as u; print(u.find_spec('torch'), "
        probe += "u.find_spec('engineworks').origin)"
        torch, origin = run(python, "-c", probe, cwd=tmp_path).split()
        assert torch == "None"
        assert Path(origin).is_relative_to(elsewhere)
        write_tiny_noising_bundle(tmp_path / "bundle", int8=True)
        write_parts(tmp_path / "data")
        command = elsewhere / "venv/bin/engineworks"
        said = run(
            *(command, "infer", "bundle", "--source", "data/test", "--out", "out"),
            *("--jsonl", "--save-overlays"),
            cwd=tmp_path,
        )
        assert said.startswith("8 done, 0 failed")
        assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 8
        assert "image_auroc" in run(command, "eval", "bundle", "--data", "data", cwd=tmp_path)
        assert "engineworks" in run(command, "--version", cwd=tmp_path)

    def test_works_beside_another_package_that_ships_a_runtime(
        self, elsewhere: Path, tmp_path: Path
    ) -> None:
        write_tiny_noising_bundle(tmp_path / "bundle")
        write_parts(tmp_path / "data")
        code = (
            "import runtime\n"
            "from engineworks import NoisingSystem, open_bundle, read_image\n"
            "with open_bundle('bundle', NoisingSystem) as system:\n"
            "    (result,) = system.infer([read_image('data/test/scratch/000.png')])\n"
            "print(result.is_anomalous, runtime.WHOSE)\n"
        )
        said = run(elsewhere / "venv/bin/python", "-c", code, cwd=tmp_path)
        assert said == "True somebody else's\n"
