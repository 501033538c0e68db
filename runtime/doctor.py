"""What is installed here, what can run, and what to install for the rest."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from engineworks import __version__
from engineworks.runtime import gpu
from engineworks.runtime.engines import BACKENDS
from engineworks.runtime.errors import BackendError
from engineworks.runtime.threads import available_threads

# pairs of packages that install the same files over each other
_CLASHES = (
    ("onnxruntime", "onnxruntime-gpu"),
    ("faiss-cpu", "faiss-gpu-cu12"),
    ("opencv-python", "opencv-python-headless"),
)
_PACKAGES = {
    "base": (
        *("numpy", "opencv-python-headless", "av", "onnx"),
        *("pydantic", "PyYAML", "click", "rich"),
    ),
    "cpu": ("onnxruntime", "openvino", "faiss-cpu"),
    "gpu": ("onnxruntime-gpu", "tensorrt", "pycuda", "faiss-gpu-cu12"),
    "train": (
        *("torch", "torchvision", "timm", "accelerate"),
        *("safetensors", "tensorboard", "onnxscript", "onnxslim"),
    ),
}
_ALTERNATIVES = {"cpu": "gpu", "gpu": "cpu"}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: ``ok``, ``missing`` (something optional is not there) or ``problem``.
        text: what was found.
        fix: what to do about it.
    """

    level: Literal["ok", "missing", "problem"]
    text: str
    fix: str | None = None


def installed(package: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def need(package: str, extra: str) -> None:
    """Refuse to go on without a package.

    Raises:
        BackendError: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise BackendError(
            f"this command needs '{package}', which is not installed",
            fix=f'pip install "engineworks[{extra}]"',
        )


def examine() -> Iterator[Finding]:
    """Look at this machine, most important things first."""
    yield Finding("ok", f"engineworks {__version__}, Python {platform.python_version()}")
    yield Finding(
        "ok",
        f"{cpu_model()}, {available_threads()} cores, instructions for INT8 and bfloat16: "
        f"{', '.join(int8_features()) or 'none known'}",
    )
    yield _gpu()
    for name, backend in BACKENDS.items():
        reason = backend.why_not()
        if reason is None:
            yield Finding("ok", f"backend {name}: usable ({', '.join(backend.variants)})")
        else:
            yield Finding("missing", f"backend {name}: {reason}", _warned(backend.install))
    for extra, packages in _PACKAGES.items():
        found = {package: installed(package) for package in packages}
        there = [f"{package} {number}" for package, number in found.items() if number]
        absent = [package for package, number in found.items() if not number]
        if there:
            yield Finding("ok", f"{extra}: {', '.join(there)}")
        if absent:
            level: Literal["missing", "problem"] = "problem" if extra == "base" else "missing"
            yield Finding(level, f"{extra}: without {', '.join(absent)}", _warned(_line(extra)))
    for first, second in _CLASHES:
        if installed(first) and installed(second):
            yield Finding(
                "problem",
                f"{first} and {second} are both installed; they overwrite each other's files",
                f"pip uninstall -y {first} {second}, then install one of them",
            )


def _gpu() -> Finding:
    found = gpu.find()
    if found is None:
        return Finding("missing", "no CUDA device: there is no driver, or it sees none")
    return Finding(
        "ok",
        f"{found.name}, compute capability {found.compute_capability}, "
        f"{found.memory_bytes / 2**30:.0f} GiB, driver {found.driver or 'unknown'}, "
        f"CUDA up to {found.cuda}",
    )


def _line(extra: str) -> str:
    return f'pip install "engineworks[{extra}]"' if extra != "base" else "pip install ."


def _warned(line: str) -> str:
    """An install line, and where not to type it."""
    for extra, other in _ALTERNATIVES.items():
        if line == _line(extra) and any(installed(package) for package in _PACKAGES[other]):
            return f"{line}  in another environment: here it would overwrite parts of [{other}]"
    return line


def cpu_model() -> str:
    """The processor's name, as the system tells it."""
    info = _cpuinfo()
    return info.get("model name") or platform.processor() or platform.machine()


def int8_features() -> list[str]:
    """Instruction sets that speed up INT8 and bfloat16 networks on this processor."""
    known = ("avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")
    flags = _cpuinfo()
    have = set((flags.get("flags") or flags.get("Features") or "").split())
    return [flag for flag in known if flag in have]


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    first = path.read_text().split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
