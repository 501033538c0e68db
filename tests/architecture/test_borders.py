"""Who may import whom, and what may not stand in the code at all."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engineworks.runtime.systems import SYSTEMS

ROOT = Path(__file__).parents[2]
PACKAGES = ("runtime", "calibration", "batch", "training", "export")
FACE = ROOT / "engineworks"
MODULES = [FACE / "__init__.py", ROOT / "cli.py", *sorted((FACE / "commands").glob("*.py"))]
MODULES += sorted(p for name in PACKAGES for p in (ROOT / name).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SHIPPED = [*MODULES, *EXAMPLES, *PAGES, ROOT / "Makefile", ROOT / "setup.cfg", ROOT / ".ci" / "run"]


# package -> what it may not know
_ABOVE = {
    "runtime": {"calibration", "batch", "training", "export", "commands", "cli"},
    "calibration": {"batch", "training", "export", "commands", "cli"},
    "batch": {"calibration", "training", "export", "commands", "cli"},
    "training": {"calibration", "batch", "export", "commands", "cli"},
    "export": {"commands", "cli"},
    "engineworks": {"cli"},  # the commands
    "cli": set(),
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, those inside of functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def texts(path: Path) -> Iterator[str]:
    """Every string of a file but docstrings; of f-strings, what stands between the values."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def calls(path: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node


def imported_by_call(path: Path) -> Iterator[str]:
    """Every module that a file names in a call of ``import_module``."""
    for call in calls(path):
        if ast.unparse(call.func).endswith("import_module") and call.args:
            name = call.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.value


class TestTheLayers:
    def test_keep_the_contracts_of_setup_cfg(self) -> None:
        command = "from importlinter.cli import lint_imports_command as run; run()"
        done = subprocess.run(
            [sys.executable, "-c", command, "--no-cache"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "0 broken" in done.stdout

    def test_end_at_the_command_line_that_nothing_imports(self) -> None:
        assert [name_of(p) for p in MODULES if "engineworks.cli" in imports(p)] == []

    @pytest.mark.parametrize("path", MODULES[1:], ids=name_of)
    def test_hold_for_modules_that_are_named_in_text(self, path: Path) -> None:
        """What ``import_module`` is called with, wherever it comes from, no linter sees."""
        above = _ABOVE[path.relative_to(ROOT).parts[0].removesuffix(".py")]
        named = {
            found
            for text in texts(path)
            for found in re.findall(r"engineworks\.(\w+)", text)
            if found in above
        }
        assert named == set()

    @pytest.mark.parametrize("package", ["runtime", "training", "export"])
    def test_keep_the_systems_apart(self, package: str) -> None:
        folder = ROOT / package / "systems"
        for system in SYSTEMS:
            own = [folder / f"{system}.py", *(folder / system).rglob("*.py")]
            foreign = [name for name in SYSTEMS if name != system]
            others = [f"engineworks.{p}.systems.{name}" for p in PACKAGES for name in foreign]
            for path in filter(Path.is_file, own):
                foreign = [
                    name
                    for name in imports(path)
                    if any(name == other or name.startswith(f"{other}.") for other in others)
                ]
                assert foreign == [], name_of(path)


# what names a system outside of its own rooms, and why
_NAMING = {
    "engineworks/__init__.py": "the public face: each system's class and results have a name",
    "engineworks/commands/export.py": "the help of backbone:NAME",
    "export/systems/__init__.py": "the table of recipes",
    "runtime/systems/__init__.py": "the table of systems",
    "runtime/testing/bundles.py": "a tiny bundle of every system",
    "runtime/tracking.py": "the extra to install is called refdet",
    "training/backbones.py": "a net that an engine runs is a bundle of backbone",
    "training/features.py": "a net that an engine runs is a bundle of backbone",
    "training/systems/__init__.py": "the table of tasks",
}


class TestSharedCode:
    def test_names_no_system_but_where_it_says_why(self) -> None:
        """Names, imports and texts; "backbone" is a word of the field, and counts where it is the
        system's: in quotes alone, in an import, or with a NAME.
        """
        pattern = re.compile(
            r"\b(?:noising|paco|refdet|stripe)\b|systems(?:\.| import .*)\bbackbone\b"
            r"|[\"']backbone[\"']|backbone:NAME"
        )
        rooms = [
            path
            for path in MODULES
            if set(path.relative_to(ROOT).with_suffix("").parts) & set(SYSTEMS)
        ]
        assert len(rooms) > 30  # the pattern of a room still finds them
        naming = {
            name_of(path)
            for path in MODULES
            if path not in rooms and pattern.search(path.read_text(encoding="utf-8"))
        }
        assert naming == set(_NAMING)


class TestNoFile:
    @pytest.mark.parametrize("path", [*MODULES, *TESTS], ids=name_of)
    def test_imports_pickle_or_what_is_made_of_it(self, path: Path) -> None:
        banned = {"pickle", "cPickle", "_pickle", "dill", "joblib", "shelve", "marshal"}
        assert {name.split(".")[0] for name in imports(path)} & banned == set()

    @pytest.mark.parametrize("path", [*MODULES, *TESTS, *EXAMPLES], ids=name_of)
    def test_imports_a_package_beside_engineworks(self, path: Path) -> None:
        """Imported as ``runtime`` from a clone, a module would be there twice, and fail a match."""
        own = {*PACKAGES, "cli"}
        named = [*imports(path), *imported_by_call(path)]
        assert [name for name in named if name.split(".")[0] in own] == []

    def test_loads_foreign_weights_without_weights_only(self) -> None:
        for path in MODULES:
            for call in calls(path):
                if ast.unparse(call.func) == "torch.load":
                    options = {option.arg: ast.unparse(option.value) for option in call.keywords}
                    assert options.get("weights_only") == "True", name_of(path)

    def test_lets_numpy_unpickle(self) -> None:
        for path in MODULES:
            for call in calls(path):
                assert "allow_pickle" not in {option.arg for option in call.keywords}, name_of(path)

    def test_prints_but_the_command_line(self) -> None:
        for path in MODULES:
            for call in calls(path):
                assert ast.unparse(call.func) != "print", name_of(path)

    @pytest.mark.parametrize("path", SHIPPED, ids=name_of)
    def test_names_a_folder_of_somebodys_machine(self, path: Path) -> None:
        found = re.findall(r"(?<![\w.])/(?:work|tmp|root|home|Users)/\S*", path.read_text())
        assert found == []

    def test_is_longer_than_600_lines(self) -> None:
        lengths = {name_of(path): len(path.read_text().splitlines()) for path in MODULES}
        assert {name: length for name, length in lengths.items() if length > 600} == {}

    def test_is_a_drawer_for_everything(self) -> None:
        drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
        assert [name_of(path) for path in MODULES if path.stem in drawers] == []


class TestEveryModule:
    @pytest.mark.parametrize("path", MODULES, ids=name_of)
    def test_says_what_it_is_for(self, path: Path) -> None:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not tree.body or ast.get_docstring(tree)


class TestEveryPage:
    @pytest.mark.parametrize("path", PAGES, ids=name_of)
    def test_links_to_files_that_exist(self, path: Path) -> None:
        targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(?:#[^)]*)?\)", path.read_text())
        assert [target for target in targets if not (path.parent / target).exists()] == []

    def test_of_the_design_names_every_module(self) -> None:
        """A module that the page does not know, or a page that is out of date, fails here."""
        page = (ROOT / "docs" / "design.md").read_text()
        tree = re.findall(r"[\w/{},*<>]+\.(?:py|yaml)", page)
        named = {name.rsplit("/", 1)[-1] for entry in tree for name in _expand(entry)}
        missing = [
            name_of(path)
            for path in MODULES
            if path.name not in named
            and path.name != "__init__.py"
            and path.stem not in SYSTEMS  # <system>.py stands for them
        ]
        assert missing == []


def _expand(entry: str) -> list[str]:
    """``a/{b,c}.py`` -> ``a/b.py``, ``a/c.py``."""
    found = re.fullmatch(r"(.*)\{([^}]*)\}(.*)", entry)
    if not found:
        return [entry]
    head, middle, tail = found.groups()
    return [f"{head}{part}{tail}" for part in middle.split(",")]
