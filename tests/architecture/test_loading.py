"""What an import or a command loads: torch ends at the float bundle, and ``--help`` is instant.

import-linter finds an import that is hidden in a function, these tests find one that comes in
through a parent package; each is blind where the other sees.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from engineworks.runtime.bundle import read, write
from engineworks.runtime.testing import write_parts, write_tiny_noising_bundle
from engineworks.runtime.verdict import decide

ROOT = Path(__file__).parents[2]
TORCH = ("torch", "torchvision", "timm", "accelerate", "safetensors", "tensorboard")
UPPER = (
    "engineworks.training",
    "engineworks.export",
    "engineworks.calibration",
    "engineworks.batch",
)
# of the extras gpu, serve and ray, and of Triton's own interpreter: absent on most machines
OPTIONAL = (
    "tensorrt", "pycuda", "kserve", "fastapi", "uvicorn", "orjson", "prometheus_client",
    "triton_python_backend_utils", "ray",
)  # fmt: skip


def modules(package: str) -> list[str]:
    """Dotted names of all modules of a package."""
    files = sorted((ROOT / package).rglob("*.py"))
    parts = [("engineworks", *file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return [".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts]


TORCH_FREE = [
    *modules("runtime"),
    *modules("calibration"),
    *modules("batch"),
    *(
        name
        for name in modules("export")
        if name != "engineworks.export.trace" and not name.startswith("engineworks.export.systems.")
    ),
    *(
        name
        for name in modules("training")
        if name.endswith((".sample", ".config"))
        or name in ("engineworks.training", "engineworks.training.systems")
    ),
]

# A module whose entry is None cannot be imported: ImportError, as on a machine without it.
WITHOUT_TORCH = f"import sys; sys.modules.update(dict.fromkeys({TORCH!r})); "


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def loaded(arguments: Sequence[object]) -> tuple[int, set[str]]:
    """Exit code of a command and the modules that it imported, by ``-X importtime``."""
    done = python("-X", "importtime", "cli.py", *map(str, arguments))
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return done.returncode, {line.rsplit("|", 1)[1].strip() for line in lines}


def packages(names: set[str]) -> set[str]:
    """Top-level packages, and those right below engineworks by their whole names."""
    parts = [name.split(".") for name in names]
    return {".".join(p[:2]) if p[0] == "engineworks" else p[0] for p in parts}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loading") / "bundle"
    write_tiny_noising_bundle(folder, int8=True)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("loading-data"))


class TestWithoutTorch:
    def test_every_module_this_side_of_the_line_can_be_imported(self) -> None:
        code = WITHOUT_TORCH + (
            "import importlib\n"
            f"for name in {TORCH_FREE!r}:\n"
            "    try: importlib.import_module(name)\n"
            "    except ModuleNotFoundError as error:\n"
            f"        if error.name.split('.')[0] not in {OPTIONAL!r}: raise\n"
        )
        done = python("-c", code)
        assert done.returncode == 0, done.stderr

    def test_the_list_holds_what_a_machine_without_torch_must_do(self) -> None:
        stages = ("pipeline", "int8", "quantize", "legality", "passes", "parity", "sensitivity")
        needed = {
            "engineworks.runtime.infer",
            "engineworks.calibration.calibrate",
            *(f"engineworks.export.{s}" for s in stages),
        }
        assert needed <= set(TORCH_FREE)

    @pytest.mark.parametrize("backend", ["ort", "openvino"])
    def test_a_bundle_infers(self, backend: str, bundle: Path, data: Path, tmp_path: Path) -> None:
        arguments = ["infer", str(bundle), "--source", str(data / "test"), "--out", str(tmp_path)]
        arguments += ["--backend", backend, "--save-overlays"]
        done = python("-c", f"{WITHOUT_TORCH}from engineworks.cli import main; main({arguments!r})")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("8 done, 0 failed")

    def test_a_float_bundle_becomes_int8(self, data: Path, tmp_path: Path) -> None:
        write_tiny_noising_bundle(tmp_path / "float")
        arguments = ["export", str(tmp_path / "float"), "--out", str(tmp_path / "int8"), "--int8"]
        arguments += ["--samples", str(data), "--num-samples", "4", "--method", "minmax"]
        arguments += ["--seconds", "0.1"]
        done = python("-c", f"{WITHOUT_TORCH}from engineworks.cli import main; main({arguments!r})")
        assert done.returncode == 0, done.stderr

    def test_a_bundle_is_shown_where_no_engine_and_no_exporter_is(
        self, bundle: Path, tmp_path: Path
    ) -> None:
        plain = read(bundle)
        speed = {"int8_speedup": 2.0, "int8_speedup_low": 2.0, "int8_speedup_high": 2.0}
        verdict = decide({}, {"ort": {"p50_ms": {}, "stable": True, **speed}})
        decisions = {"decisions": {"float": []}, "passed": True, "failed": {}}
        manifest = plain.manifest.model_copy(
            update={"reports": {"gate": decisions, "verdict": verdict}}
        )
        files = {name: plain.path(name) for name in plain.manifest.files}
        judged = write(tmp_path / "judged", manifest, files)
        absent = (*TORCH, "onnxruntime", "openvino", "faiss", "tensorrt", *UPPER)
        code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); "
        code += f"from engineworks.cli import main; main(['bundle', 'show', {str(judged.root)!r}])"
        done = python("-c", code)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("noising, schema")
        assert "verdict: ship float" in done.stdout

    def test_training_says_what_to_install(self, data: Path, tmp_path: Path) -> None:
        hidden = "import importlib.util as u; find = u.find_spec; "
        hidden += "u.find_spec = lambda n, *a: None if n == 'torch' else find(n, *a); "
        arguments = ["train", "noising", "--data", str(data), "--out", str(tmp_path / "run")]
        done = python("-c", f"{hidden}from engineworks.cli import main; main({arguments!r})")
        assert done.returncode == 1
        assert 'pip install "engineworks[train]"' in done.stderr


class TestWhatACommandLoads:
    def test_infer_loads_neither_torch_nor_training(
        self, bundle: Path, data: Path, tmp_path: Path
    ) -> None:
        code, names = loaded(["infer", bundle, "--source", data / "test", "--out", tmp_path])
        assert code == 0
        tops = packages(names)
        assert "numpy" in tops  # the list is not empty for another reason
        assert tops & {*TORCH, *UPPER} == set()

    def test_help_loads_nothing_heavy(self) -> None:
        code, names = loaded(["--help"])
        assert code == 0
        tops = packages(names)
        assert "click" in tops
        heavy = {
            "ray",
            "pyarrow",
            "numpy",
            "cv2",
            "av",
            "onnx",
            "pydantic",
            "rich",
            "yaml",
            "faiss",
            "openvino",
        }
        assert tops & {*TORCH, *heavy, *UPPER} == set()

    def test_help_loads_little_at_all(self) -> None:
        """What makes it instant. 155 modules are loaded, Python's own start is a third of them; a
        package of the usual size brings more than a hundred.
        """
        code, names = loaded(["--help"])
        assert code == 0
        assert 50 < len(names) < 220


class TestNothingIsTold:
    def home_after(self, tmp_path: Path, code: str, **variables: str) -> list[str]:
        """What lies in the home of a process that ran some code."""
        silent = ("ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED", "CI", "XDG_CACHE_HOME")
        environment = {k: v for k, v in os.environ.items() if k not in silent}
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**environment, **variables, "HOME": str(tmp_path)},
            check=True,
        )
        return [path.name for path in tmp_path.rglob("*")]

    def test_by_onnxruntime(self, tmp_path: Path) -> None:
        bundle = write_tiny_noising_bundle(tmp_path / "bundle")
        home = tmp_path / "home"
        home.mkdir()
        code = f"""
from engineworks import open_bundle, read_image
import numpy as np
with open_bundle({str(bundle.root)!r}, backend="ort") as system:
    system.infer([np.zeros((64, 64, 3), np.uint8)])
"""
        assert not {"deviceid", "Microsoft"}.intersection(self.home_after(home, code))

    @pytest.mark.parametrize("name", ["ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED"])
    def test_unless_somebody_wants_it(self, name: str) -> None:
        code = f"import os, engineworks; print(os.environ[{name!r}])"
        for given, want in (({}, "1"), ({name: "0"}, "0")):
            kept = {k: v for k, v in os.environ.items() if k != name}
            done = subprocess.run(
                [sys.executable, "-c", code],
                cwd=ROOT,
                env={**kept, **given},
                capture_output=True,
                text=True,
                check=True,
            )
            assert done.stdout.strip() == want
