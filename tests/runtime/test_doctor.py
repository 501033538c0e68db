from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from pathlib import Path

import pytest

from engineworks.runtime import doctor, gpu
from engineworks.runtime.doctor import Finding, examine

BASE = doctor._PACKAGES["base"]
CPU = doctor._PACKAGES["cpu"]
GPU = doctor._PACKAGES["gpu"]

Install = Callable[[Collection[str]], list[Finding]]


@pytest.fixture
def examined_with(monkeypatch: pytest.MonkeyPatch) -> Install:
    """What the doctor finds where exactly these distributions are installed."""
    modules = {"tensorrt", "pycuda", "openvino", "onnxruntime"}

    def examined(packages: Collection[str]) -> list[Finding]:
        monkeypatch.setattr(doctor, "installed", lambda name: "1.0" if name in packages else None)
        real = importlib.util.find_spec

        def find_spec(name: str) -> object:
            if name not in modules:
                return real(name)
            return (real(name) or object()) if name in packages else None

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)
        return list(examine())

    return examined


def fixes(found: list[Finding], start: str) -> list[str | None]:
    return [finding.fix for finding in found if finding.text.startswith(start)]


class TestTheDoctor:
    def test_finds_no_problem_here(self) -> None:
        found = list(examine())

        assert [finding.text for finding in found if finding.level == "problem"] == []
        assert found[0].text.startswith("engineworks ")

    def test_names_a_missing_base_package_as_a_problem(self, examined_with: Install) -> None:
        found = examined_with([*BASE[1:], *CPU])

        problems = [finding for finding in found if finding.level == "problem"]
        assert [problem.text for problem in problems] == [f"base: without {BASE[0]}"]
        assert problems[0].fix == "pip install ."

    def test_takes_a_missing_backend_as_no_problem_but_says_how_to_get_it(
        self, examined_with: Install
    ) -> None:
        found = examined_with([*BASE, "onnxruntime", "faiss-cpu"])

        assert not [finding for finding in found if finding.level == "problem"]
        assert fixes(found, "backend openvino") == ['pip install "engineworks[cpu]"']
        assert fixes(found, "cpu: without openvino") == ['pip install "engineworks[cpu]"']

    @pytest.mark.parametrize(
        ("have", "other"), [(CPU, "gpu"), (GPU, "cpu")], ids=["on a CPU", "on a GPU"]
    )
    def test_never_advises_to_install_one_extra_over_the_other(
        self, examined_with: Install, have: tuple[str, ...], other: str
    ) -> None:
        found = examined_with([*BASE, *have])

        (advice,) = fixes(found, f"{other}: without")
        assert advice is not None
        assert "in another environment" in advice
        for finding in found:
            line = f'pip install "engineworks[{other}]"'
            assert finding.fix != line, "without the warning"

    @pytest.mark.parametrize("pair", doctor._CLASHES, ids="/".join)
    def test_detects_packages_that_overwrite_each_other(
        self, examined_with: Install, pair: tuple[str, str]
    ) -> None:
        found = examined_with({*BASE, *CPU, *pair})

        problems = [finding for finding in found if finding.level == "problem"]
        assert [problem.text for problem in problems] == [
            f"{pair[0]} and {pair[1]} are both installed; they overwrite each other's files"
        ]
        assert problems[0].fix is not None
        assert "pip uninstall" in problems[0].fix

    @pytest.mark.parametrize(
        ("have", "reason"),
        [
            ([], "'tensorrt' is not installed"),
            (["tensorrt"], "'pycuda' is not installed"),
            (["tensorrt", "pycuda"], "no CUDA driver, or no device"),
        ],
    )
    def test_says_what_a_backend_on_the_gpu_lacks(
        self,
        examined_with: Install,
        monkeypatch: pytest.MonkeyPatch,
        have: list[str],
        reason: str,
    ) -> None:
        monkeypatch.setattr(gpu, "find", lambda: None)
        (line,) = [
            f for f in examined_with([*BASE, *have]) if f.text.startswith("backend tensorrt")
        ]
        assert line.level == "missing" and reason in line.text
        assert line.fix is not None and "[gpu]" in line.fix

    def test_says_that_onnxruntime_is_the_one_for_cpus(self, examined_with: Install) -> None:
        found = examined_with([*BASE, *CPU, "pycuda"])
        (line,) = [f for f in found if f.text.startswith("backend ort-cuda")]
        assert "without libonnxruntime_providers_cuda.so" in line.text

    def test_describes_the_gpu(
        self, examined_with: Install, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        h200 = gpu.Gpu("NVIDIA H200", "9.0", "580.65.06", "13.0", 140 * 2**30)
        monkeypatch.setattr(gpu, "find", lambda: h200)
        found = examined_with([*BASE, "tensorrt", "pycuda"])
        assert (
            "NVIDIA H200, compute capability 9.0, 140 GiB, driver 580.65.06, CUDA up to 13.0"
            in [finding.text for finding in found if finding.level == "ok"]
        )
        assert [f.level for f in found if f.text.startswith("backend tensorrt")] == ["ok"]

        monkeypatch.setattr(gpu, "find", lambda: None)
        levels = [f.level for f in examined_with(BASE) if "no CUDA device" in f.text]
        assert levels == ["missing"]


class TestTheProcessor:
    CPUINFO = (
        "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n"
        "flags\t\t: fpu avx2 avx512_vnni amx_int8\n\nprocessor\t: 1\nmodel name\t: Other\n"
    )

    def test_is_named_with_its_int8_instructions(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "cpuinfo").write_text(self.CPUINFO)
        monkeypatch.setattr(doctor, "Path", lambda _path: tmp_path / "cpuinfo")

        assert doctor.cpu_model() == "Some CPU @ 2 GHz"
        assert doctor.int8_features() == ["avx512_vnni", "amx_int8"]

    def test_on_arm_is_read_from_its_features(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "cpuinfo").write_text("processor : 0\nFeatures : fp asimd asimddp i8mm\n")
        monkeypatch.setattr(doctor, "Path", lambda _path: tmp_path / "cpuinfo")

        assert doctor.int8_features() == ["asimddp", "i8mm"]
        assert doctor.cpu_model()

    def test_without_proc_has_no_known_instructions(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(doctor, "Path", lambda _path: tmp_path / "cpuinfo")

        assert doctor.int8_features() == []
        assert doctor.cpu_model()
