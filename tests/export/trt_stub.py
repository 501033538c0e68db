"""A ``tensorrt`` module with the signatures of 10.x or 11.x and nothing behind them.

Every call's arguments are bound to the signature of the real binding, an attribute that the real
class does not have cannot be set, and a name that a version lacks is missing here too. What was
called is kept in ``events``, in order.

Source: the signatures that pybind11 prints for the bindings of 10.13 and 11.4.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from enum import IntEnum
from importlib.machinery import ModuleSpec
from typing import Any

# a build steps through these phases: (name, parent, number of steps)
PHASES = (("Building", None, 2), ("Parsing", "Building", 4), ("Timing", "Building", 3))

_FLAGS_10 = (
    *("FP16", "INT8", "DEBUG", "GPU_FALLBACK", "REFIT", "TF32", "SPARSE_WEIGHTS"),
    *("VERSION_COMPATIBLE", "WEIGHT_STREAMING", "BF16", "FP8"),
)
_FLAGS_11 = (
    *("DEBUG", "GPU_FALLBACK", "REFIT", "TF32", "SPARSE_WEIGHTS"),
    *("VERSION_COMPATIBLE", "WEIGHT_STREAMING"),
)


def forget() -> None:
    """Modules that are made of a ``tensorrt`` are imported anew, of the one that is there then."""
    for name in ("engineworks.export.plan", "engineworks.runtime.engines.recorder"):
        sys.modules.pop(name, None)


def tensorrt(
    version: str,
    *,
    inputs: dict[str, tuple[int, ...]],
    parse_errors: Sequence[tuple[str, str, str]] = (),
    build: Callable[[Any], bytes | None] | None = None,
    cache_matches: bool = True,
    has_gpu: bool = True,
) -> Any:
    """The module.

    Args:
        version: what it says it is; the major number decides.
        inputs: of the network that the parser answers with: name -> shape.
        parse_errors: (operator, node, reason) of each error that parsing ends with.
        build: what building does with the config; the default steps through ``PHASES``.
        cache_matches: whether ``set_timing_cache`` takes a cache that is not empty.
        has_gpu: whether a builder can be made.
    """
    module: Any = types.ModuleType("tensorrt")
    module.__spec__ = ModuleSpec("tensorrt", None)
    module.__version__ = version
    major = int(version.split(".")[0])
    module.events = events = []

    typing = ("EXPLICIT_BATCH", "STRONGLY_TYPED") if major == 10 else ("STRONGLY_TYPED", "JIT")
    module.NetworkDefinitionCreationFlag = IntEnum("NetworkDefinitionCreationFlag", typing, start=0)
    module.BuilderFlag = IntEnum("BuilderFlag", _FLAGS_10 if major == 10 else _FLAGS_11, start=0)
    module.MemoryPoolType = IntEnum("MemoryPoolType", ("WORKSPACE", "DLA_MANAGED_SRAM"), start=0)
    module.ProfilingVerbosity = IntEnum(
        "ProfilingVerbosity", ("LAYER_NAMES_ONLY", "NONE", "DETAILED"), start=0
    )
    module.HardwareCompatibilityLevel = IntEnum(
        "HardwareCompatibilityLevel", ("NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"), start=0
    )

    class Logger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

        def __init__(self, min_severity: int = WARNING) -> None:
            pass

    class Memory(bytes):
        """``IHostMemory``: bytes by the buffer protocol."""

        __slots__ = ()

    class TimingCache:
        __slots__ = ("data",)

        def __init__(self, data: bytes) -> None:
            self.data = data

        def serialize(self) -> Memory:
            return Memory(b"timings after " + self.data)

    class OptimizationProfile:
        __slots__ = ("shapes",)

        def __init__(self) -> None:
            self.shapes: dict[str, tuple[Any, Any, Any]] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002
            self.shapes[input] = (tuple(min), tuple(opt), tuple(max))

        def __bool__(self) -> bool:
            return all(
                a <= b <= c
                for shapes in self.shapes.values()
                for a, b, c in zip(*shapes, strict=True)
            )

    class Config:
        __slots__ = (
            *("_level", "_monitor", "_verbosity", "_hardware"),
            *("flags", "pools", "profiles", "cache"),
        )

        def __init__(self) -> None:
            self.flags = {module.BuilderFlag.TF32}
            self.pools: dict[Any, int] = {}
            self.profiles: list[Any] = []
            self.cache: Any = None
            self._monitor: Any = None
            self._level, self._verbosity, self._hardware = 3, 0, 0

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            self.pools[module.MemoryPoolType(pool)] = pool_size

        def set_flag(self, flag: Any) -> None:
            self.flags.add(module.BuilderFlag(flag))

        def clear_flag(self, flag: Any) -> None:
            self.flags.discard(module.BuilderFlag(flag))

        def add_optimization_profile(self, profile: OptimizationProfile) -> int:
            if not profile:
                return -1
            self.profiles.append(profile.shapes)
            return len(self.profiles) - 1

        def create_timing_cache(self, serialized: bytes) -> TimingCache:
            return TimingCache(bytes(serialized))

        def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
            assert ignore_mismatch is False
            if cache.data and not cache_matches:
                return False
            self.cache = cache
            return True

        builder_optimization_level = property(
            lambda self: self._level, lambda self, value: setattr(self, "_level", value)
        )
        profiling_verbosity = property(
            lambda self: self._verbosity, lambda self, value: setattr(self, "_verbosity", value)
        )
        hardware_compatibility_level = property(
            lambda self: self._hardware, lambda self, value: setattr(self, "_hardware", value)
        )
        progress_monitor = property(
            lambda self: self._monitor, lambda self, value: setattr(self, "_monitor", value)
        )

    class Tensor:
        __slots__ = ("_name", "_shape")

        def __init__(self, name: str, shape: tuple[int, ...]) -> None:
            self._name, self._shape = name, shape

        name = property(lambda self: self._name)
        shape = property(lambda self: self._shape)

    class Network:
        __slots__ = ()
        num_inputs = property(lambda self: len(inputs))
        num_layers = property(lambda self: 7)

        def get_input(self, index: int) -> Tensor:
            return Tensor(*list(inputs.items())[index])

    class Builder:
        __slots__ = ("_recorder",)

        def __init__(self, logger: Logger) -> None:
            if not has_gpu:
                raise TypeError("pybind11::init(): factory function returned nullptr")
            events.append("builder")

        def create_network(self, flags: int = 0) -> Network:
            events.append(("network", flags))
            return Network()

        def create_builder_config(self) -> Config:
            module.config = Config()
            return module.config

        def create_optimization_profile(self) -> OptimizationProfile:
            return OptimizationProfile()

        def build_serialized_network(self, network: Network, config: Config) -> Memory | None:
            events.append("build")
            data = (build or step_through)(config)
            return None if data is None else Memory(data)

        def _set_recorder(self, recorder: Any) -> None:
            events.append("recorder")
            self._recorder = module.recorder = recorder

        error_recorder = property(lambda self: self._recorder, _set_recorder)

    class ParserError:
        __slots__ = ("_error",)

        def __init__(self, error: tuple[str, str, str]) -> None:
            self._error = error

        def node_operator(self) -> str:
            return self._error[0]

        def node_name(self) -> str:
            return self._error[1]

        def desc(self) -> str:
            return self._error[2]

    class OnnxParser:
        __slots__ = ()
        num_errors = property(lambda self: len(parse_errors))

        def __init__(self, network: Network, logger: Logger) -> None:
            events.append("parser")

        def parse(self, model: bytes, path: str | None = None) -> bool:
            return not parse_errors

        def get_error(self, index: int) -> ParserError:
            return ParserError(parse_errors[index])

    class IErrorRecorder:
        def __init__(self) -> None:
            pass

    class IProgressMonitor:
        def __init__(self) -> None:
            pass

    for known in (Logger, Builder, OnnxParser, IErrorRecorder, IProgressMonitor):
        setattr(module, known.__name__, known)
    return module


def step_through(config: Any) -> bytes | None:
    """A build as far as its monitor sees it: None as soon as a step is answered with False."""
    monitor = config.progress_monitor
    root, _, num_steps = PHASES[0]
    monitor.phase_start(root, None, num_steps)
    for i, (name, parent, steps) in enumerate(PHASES[1:]):
        monitor.phase_start(name, parent, steps)
        for step in range(steps):
            if not monitor.step_complete(name, step):
                return None
        monitor.phase_finish(name)
        if not monitor.step_complete(root, i):
            return None
    monitor.phase_finish(root)
    return b"plan"
