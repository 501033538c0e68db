"""Engines: one loaded graph each, behind one protocol, whatever runs it.

``BACKENDS`` is the whole registry. A backend that was asked for and is not there is an error with
the line that installs it; ``auto`` takes the first usable one of the table and its name can be
read from the engine.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from engineworks.runtime import gpu, overflow
from engineworks.runtime.errors import BackendError, EngineError, UsageError
from engineworks.runtime.tensors import Array, Feeds, TensorSpec

_log = logging.getLogger(__name__)


class Engine(Protocol):
    """A loaded graph: named tensors in, named tensors out, no state kept between runs."""

    backend: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]

    def run(self, feeds: Feeds, *, stream: int | None = None) -> dict[str, Array]:
        """Host feeds give host arrays and block; device feeds give device arrays.

        Outputs belong to the caller: a later run does not change them. With ``stream`` (a CUDA
        stream handle) the work is only queued there; without it, it has finished when ``run``
        returns. May be called from several threads.

        Raises:
            InputError: a feed that is missing, unknown or does not fit its spec.
            EngineError: the backend failed; its message is kept.
        """
        ...

    def close(self) -> None:
        """Release the graph. Closing twice is allowed; running afterwards is an EngineError."""
        ...


@dataclass(frozen=True)
class Backend:
    """One row of the table: who can open which graph variants.

    Attributes:
        module: module with ``open_graph(model, *, precision, threads)``.
        package: the import that must be there.
        install: the line that brings it.
        variants: precision -> names of graph variants in a bundle that serve it, best first.
        entry: the function of the module, where it is not ``open_graph``.
        also: further imports that must be there.
        library: a file in the package's folder that must be there.
        needs_gpu: whether a CUDA device must be there.
    """

    module: str
    package: str
    install: str
    variants: Mapping[str, tuple[str, ...]]
    entry: str = "open_graph"
    also: tuple[str, ...] = ()
    library: str | None = None
    needs_gpu: bool = False

    def why_not(self) -> str | None:
        """None where the backend can be used here, else the reason in words."""
        if importlib.util.find_spec(self.package) is None:
            return f"the package '{self.package}' is not installed"
        if self.library and not (_folder(self.package) / self.library).is_file():
            return f"the installed '{self.package}' is one without {Path(self.library).name}"
        for package in self.also:
            if importlib.util.find_spec(package) is None:
                return f"the package '{package}' is not installed"
        if self.needs_gpu and gpu.find() is None:
            return "there is no CUDA driver, or no device"
        return None


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else Path()


# Order is preference for ``auto``. Variant names are those of docs/bundle-format.md.
BACKENDS: dict[str, Backend] = {
    "tensorrt": Backend(
        module="engineworks.runtime.engines.trt",
        package="tensorrt",
        install='pip install "engineworks[gpu]"',
        variants={
            "int8": ("int8-plan",),
            "float": ("float-plan",),
            "fp16": ("fp16-plan",),
            "bf16": ("bf16-plan",),
        },
        also=("pycuda",),
        needs_gpu=True,
    ),
    "openvino": Backend(
        module="engineworks.runtime.engines.openvino",
        package="openvino",
        install='pip install "engineworks[cpu]"',
        # behind the Concat of signed INT8 tensors OpenVINO 2026.4 computes wrong numbers;
        # int8-openvino: what joins maps is fast in no other form
        variants={
            "int8": ("int8-openvino", "int8-u8", "int8"),
            "int8-bf16": ("int8-openvino", "int8-u8", "int8"),
            "float": ("float",),
            "bf16": ("float",),
        },
    ),
    "ort": Backend(
        module="engineworks.runtime.engines.ort",
        package="onnxruntime",
        install='pip install "engineworks[cpu]"  (or [gpu])',
        # int8-ort: what follows a SiLU is fast in no other form
        variants={"int8": ("int8-ort", "int8-u8", "int8"), "float": ("float",), "fp16": ("fp16",)},
    ),
    # asked for by name: `auto` has met `ort` by then
    "ort-cuda": Backend(
        module="engineworks.runtime.engines.ort_gpu",
        package="onnxruntime",
        install='pip install "engineworks[gpu]"',
        # no kernels for Q/DQ: it would compute INT8 graphs in float32, and slower
        variants={"float": ("float",), "fp16": ("fp16",)},
        entry="open_cuda",
        also=("pycuda",),
        library="capi/libonnxruntime_providers_cuda.so",
        needs_gpu=True,
    ),
    "ort-tensorrt": Backend(
        module="engineworks.runtime.engines.ort_gpu",
        package="onnxruntime",
        install='pip install "engineworks[gpu]"',
        variants={"int8": ("int8",), "float": ("float",)},
        entry="open_tensorrt",
        also=("pycuda",),
        library="capi/libonnxruntime_providers_tensorrt.so",
        needs_gpu=True,
    ),
}


def check_backend(name: str) -> Backend:
    """The table's row for ``name``.

    Raises:
        UsageError: no such backend.
        BackendError: it cannot be used here; the fix is the install line.
    """
    if name not in BACKENDS:
        raise UsageError(
            f"there is no backend '{name}'", fix=f"choose one of {', '.join(BACKENDS)}"
        )
    backend = BACKENDS[name]
    if reason := backend.why_not():
        raise BackendError(f"backend '{name}' cannot be used: {reason}", fix=backend.install)
    return backend


def open_engine(
    model: Path | bytes,
    backend: str,
    *,
    precision: str = "float",
    threads: int | None = None,
    host_code: bool = False,
    again: Callable[[], bytes] | None = None,
) -> Engine:
    """Load one graph with one backend.

    A process that is forked off meanwhile may run the engine as well: it opens the graph anew.

    Args:
        model: an ONNX file (or a plan for ``tensorrt``) of the variant that fits the backend, or
            its bytes.
        backend: a name in ``BACKENDS``.
        precision: ``float`` (float32 arithmetic), ``fp16`` (mixed graph: float16 with float32 where
            it matters), ``bf16`` (bfloat16 arithmetic where the backend can, by a mixed graph or
            by itself), ``int8`` (a Q/DQ graph, the rest in float32) or ``int8-bf16`` (the rest in
            bfloat16).
        threads: number of CPU threads; None takes all cores that this process may use.
        host_code: let a plan for ``tensorrt`` bring program code of its own, as version-compatible
            plans do. Only for plans that you built yourself.
        again: gives the same bytes again, for a forked process; where it is not given, ``model``
            is kept.

    Raises:
        UsageError: no such backend, or it does not offer that precision.
        BackendError: the backend is not installed here.
        EngineError: the graph cannot be loaded; the backend's message is kept.
    """
    row = check_backend(backend)
    if precision not in row.variants:
        raise UsageError(
            f"backend '{backend}' does not run precision '{precision}'",
            fix=f"choose one of {', '.join(row.variants)}, or another backend",
        )
    entry = _entry(backend)
    options = {"host_code": True} if host_code else {}
    narrow = precision.startswith("int8") and products_overflow(backend)

    def opened(source: Path | bytes) -> Engine:
        if narrow:
            source = _narrowed(source)
        try:
            engine: Engine = entry(source, precision=precision, threads=threads, **options)
        except ValidationError as error:
            raise EngineError(
                f"backend '{backend}' opened a graph whose tensors are none: "
                f"{error.errors()[0]['msg']}",
                fix="export the bundle again",
            ) from error
        return engine

    return _PerProcess(opened(model), lambda: opened(model if again is None else again()))


def _entry(backend: str) -> Any:
    """The function that opens a graph with a backend."""
    row = BACKENDS[backend]
    try:
        return getattr(importlib.import_module(row.module), row.entry)
    except ImportError as error:  # the package is there, a library that it loads is not
        raise BackendError(f"backend '{backend}' cannot be loaded: {error}", fix=row.install) from (
            error
        )


@cache
def products_overflow(backend: str) -> bool:
    """Whether a backend's INT8 products overflow on this processor; see ``runtime.overflow``.

    Found out by a product. ``open_engine`` looks after it; who multiplies by other means than a
    Q/DQ graph's layers keeps weights within ``overflow.LIMIT``.

    Raises:
        BackendError: the backend cannot be loaded.
    """
    if BACKENDS[backend].needs_gpu:
        return False
    engine = _entry(backend)(overflow.probe(), precision="int8", threads=1)
    _probes.append(engine)
    return bool((engine.run({"x": overflow.PROBED})["y"] != overflow.ANSWER).any())


# never closed: a forked process could not open an OpenVINO engine with as many threads any more
_probes: list[Engine] = []


def _narrowed(model: Path | bytes) -> bytes:
    content, rounded = overflow.narrow(model if isinstance(model, bytes) else model.read_bytes())
    if rounded:
        _say_narrowed()
    return content


@cache
def _say_narrowed() -> None:
    """Once in a process."""
    _log.warning(
        "this processor has no VNNI: where INT8 sums could overflow, weights are rounded to 7 bits "
        "(`export --int8` on this machine judges that)"
    )


# what a parent has opened: to release it here would mean to wait for its threads
_inherited: list[Engine] = []


class _PerProcess:
    """An engine that a forked process opens anew when it first runs it: threads stay behind."""

    def __init__(self, engine: Engine, again: Callable[[], Engine]) -> None:
        self.backend = engine.backend
        self.inputs: Mapping[str, TensorSpec] = engine.inputs
        self.outputs: Mapping[str, TensorSpec] = engine.outputs
        self._engine = engine
        self._again = again
        self._process = os.getpid()
        self._closed = False
        self._lock = threading.Lock()

    def run(self, feeds: Feeds, *, stream: int | None = None) -> dict[str, Array]:
        if self._process != os.getpid() and not self._closed:
            self._open_here()
        return self._engine.run(feeds, stream=stream)

    def close(self) -> None:
        self._closed = True
        if self._process == os.getpid():
            self._engine.close()

    def _open_here(self) -> None:
        with self._lock:
            if self._process != os.getpid():
                _inherited.append(self._engine)
                self._engine = self._again()
                self._process = os.getpid()
