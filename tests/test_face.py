"""The public face: what it names, where that lives, and what importing it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import engineworks
from engineworks import AnomalyMap, NoisingSystem, open_bundle
from engineworks.runtime.errors import BundleError, EngineError
from engineworks.runtime.signing import make_keys, sign
from engineworks.runtime.testing import (
    draw_part,
    write_tiny_noising_bundle,
    write_tiny_paco_bundle,
)

ROOT = Path(__file__).parents[1]
FACE = ROOT / "engineworks" / "__init__.py"
HEAVY = {"numpy", "cv2", "av", "onnx", "pydantic", "torch", "yaml", "click"}


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


def told_to_type_checkers() -> dict[str, str]:
    """Public name -> where the imports below ``TYPE_CHECKING`` say that it comes from."""
    tree = ast.parse(FACE.read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    return {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


class TestThePublicFace:
    def test_loads_nothing_heavy(self) -> None:
        done = python("import sys, engineworks; print(*sys.modules)")
        loaded = {name.split(".")[0] for name in done.stdout.split()}
        assert "engineworks" in loaded  # the list is not empty for another reason
        assert loaded & HEAVY == set()
        assert "engineworks.runtime" not in done.stdout.split()

    def test_tells_type_checkers_the_names_that_it_promises(self) -> None:
        assert sorted(told_to_type_checkers()) == sorted(engineworks.__all__)

    @pytest.mark.train
    @pytest.mark.parametrize("name", engineworks.__all__)
    def test_gives_what_it_tells_type_checkers(self, name: str) -> None:
        module, _, there = told_to_type_checkers()[name].partition(":")
        home = import_module(module)
        found = getattr(engineworks, name)
        assert found is getattr(home, there)
        assert found.__doc__

    def test_has_no_other_names(self) -> None:
        assert set(dir(engineworks)) == {*engineworks.__all__, "__version__"}
        with pytest.raises(AttributeError, match="no attribute 'open_bundel'"):
            engineworks.open_bundel  # noqa: B018

    def test_names_the_package_that_is_missing(self) -> None:
        done = python(
            "import sys; sys.modules['torch'] = None\n"
            "try: from engineworks import train\n"
            "except ImportError as error: print(error)"
        )
        assert "engineworks.train needs 'torch'" in done.stdout
        assert 'pip install "engineworks[train]"' in done.stdout

    def test_is_told_what_changed(self) -> None:
        page = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
        assert f"## [{engineworks.__version__}]" in page

    def test_is_listed_on_the_page_of_promises(self) -> None:
        page = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
        assert [name for name in engineworks.__all__ if f"`{name}`" not in page] == []


@pytest.mark.slow
class TestTheTypes:
    def test_are_those_of_each_system(self, tmp_path: Path) -> None:
        """Told by mypy strict: every system is a ``System``, and its results are its own."""
        results = {"Noising": "is_anomalous", "Paco": "label", "Stripe": "defects"}
        results |= {"Refdet": "objects", "Backbone": "vector_F"}
        code = "from engineworks import *\n\ndef take(system: System) -> None: ...\n\n"
        for name, attribute in results.items():
            code += f"with open_bundle('b', {name}System) as {name}:\n"
            code += f"    take({name})\n    {name}.infer([])[0].{attribute}\n"
            code += f"    {name}.infer([])[0].none_such\n"
        (tmp_path / "user.py").write_text(code, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "mypy", "--config-file", "setup.cfg", tmp_path / "user.py"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.count('has no attribute "none_such"') == len(results), done.stdout
        assert f"Found {len(results)} errors" in done.stdout


class TestOpeningABundle:
    def test_gives_the_system_that_was_asked_for(
        self, tmp_path: Path, rng: np.random.Generator
    ) -> None:
        write_tiny_noising_bundle(tmp_path / "bundle")
        image, _ = draw_part(rng, (64, 64), defective=False)
        with open_bundle(str(tmp_path / "bundle"), NoisingSystem, precision="float") as system:
            assert isinstance(system, NoisingSystem)
            (result,) = system.infer([image])
        assert isinstance(result, AnomalyMap)

    def test_refuses_another_system(self, tmp_path: Path) -> None:
        write_tiny_paco_bundle(tmp_path / "bundle")
        with pytest.raises(BundleError, match="holds the system 'paco', not 'noising'"):
            open_bundle(tmp_path / "bundle", NoisingSystem)

    def test_refuses_what_the_signers_have_not_signed(self, tmp_path: Path) -> None:
        bundle = write_tiny_paco_bundle(tmp_path / "bundle")
        make_keys(tmp_path / "key", tmp_path / "key.pub")
        with pytest.raises(BundleError, match="not signed"):
            open_bundle(bundle.root, signers=[tmp_path / "key.pub"])
        sign(bundle, tmp_path / "key")
        open_bundle(bundle.root, signers=[tmp_path / "key.pub"]).close()

    def test_closes_the_engines_at_its_end(self, tmp_path: Path) -> None:
        write_tiny_paco_bundle(tmp_path / "bundle")
        with open_bundle(tmp_path / "bundle") as system:
            (shape,) = [spec.shape for spec in system.engines["classify"].inputs.values()]
        images_BCHW = np.zeros((1, *(int(side) for side in shape[1:])), np.float32)
        with pytest.raises(EngineError, match="closed"):
            system.engines["classify"].run({"images": images_BCHW})


class TestAFolderByItsOwnName:
    """As scripts in the root of a checkout may import it."""

    @pytest.mark.parametrize("first", ["runtime", "engineworks.runtime"])
    def test_is_the_same_package_whichever_comes_first(self, first: str) -> None:
        done = python(
            f"import {first}.errors\n"
            "import runtime.systems.noising, engineworks.runtime.systems.noising as known\n"
            "from runtime.errors import BundleError\n"
            "from engineworks.runtime import errors\n"
            "assert BundleError is errors.BundleError\n"
            "assert runtime.systems.noising is known\n"
            "print(known.__name__, known.__spec__.name, BundleError.__module__)"
        )
        assert done.stderr == ""
        name = "engineworks.runtime.systems.noising"
        assert done.stdout.split() == [name, name, "engineworks.runtime.errors"]

    @pytest.mark.parametrize("folder", ["runtime", "calibration", "export", "training"])
    def test_is_one_package_in_every_case(self, folder: str) -> None:
        done = python(f"import {folder}, engineworks.{folder}\nprint({folder}.__name__)")
        assert done.stdout.strip() == f"engineworks.{folder}", done.stderr

    def test_leaves_alone_what_is_not_there(self) -> None:
        done = python("import runtime.nothing")
        assert "No module named 'engineworks.runtime.nothing'" in done.stderr
