"""ONNX -> TensorRT plan: the only builder in the project. Needs TensorRT, and no torch.

The graph says everything: its types are the types that run (strong typing), INT8 stands in it as
Q/DQ pairs, 16 bits as Casts. So one call serves TensorRT 10.x and 11.x, and there is no calibrator
and no precision flag. What TensorRT would only notice late, or not at all, is checked before.

A build on TensorRT 11.4's bindings and a builder for the CPU is part of the tests; a build on a GPU
has not been seen.

Source: NVIDIA TensorRT documentation, Python API, 10.x and 11.x.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import tensorrt as trt
from google.protobuf.message import DecodeError

from engineworks.export.legality import check_legal
from engineworks.runtime import files
from engineworks.runtime.engines.recorder import Recorder
from engineworks.runtime.errors import BackendError, ExportError
from engineworks.runtime.plans import Machine, PlanConfig, Profile, Shape, ShapeRange

Progress = Callable[[int, int], None]

_MIB = 1 << 20
_PROGRESS_STEPS = 1000
_HARDWARE = {
    "same-compute-capability": "SAME_COMPUTE_CAPABILITY",
    "ampere-plus": "AMPERE_PLUS",
}
# TensorRT keeps the first logger that it is given for the life of the process. Errors are taken
# from the parser and the recorder, so only its own faults are left to print.
_LOGGER = trt.Logger(trt.Logger.INTERNAL_ERROR)


@dataclass(frozen=True)
class Plan:
    """A built plan.

    Attributes:
        data: the plan file's bytes.
        num_layers: of the network that was parsed, before fusion.
        seconds: that the build took.
    """

    data: bytes
    num_layers: int
    seconds: float


def build_plan(
    model: bytes,
    config: PlanConfig,
    profiles: Sequence[Profile] = (),
    *,
    timing_cache: Path | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Plan:
    """Compile one graph for the GPU of this machine.

    Args:
        model: bytes of a complete ONNX file.
        config: of its ``profiles`` nothing is read: ``profiles`` are the shapes that they mean.
        profiles: needed where an input has a free axis.
        timing_cache: file of kernel timings, read where it is there and written afterwards; see
            ``cache_name``.
        progress: called with (done, of) from threads of TensorRT's.
        stop: set it from another thread, and the build ends soon.

    Raises:
        ExportError: no ONNX, a graph that TensorRT does not take (node and reason are named),
            profiles that do not fit it, a failed build, or ``stop``.
        QuantizationError: Q/DQ that break a rule.
        BackendError: TensorRT cannot start.
    """
    _check_onnx(model)
    recorder = Recorder()
    monitor = _Monitor(progress or (lambda _done, _of: None), stop or threading.Event())
    start = time.perf_counter()
    # every object of TensorRT dies in there; one that outlived the recorder would still call it
    data, num_layers = _compile(model, config, profiles, timing_cache, recorder, monitor)
    if data is None:
        raise _failure(recorder, monitor)
    monitor.finish()
    return Plan(data, num_layers, time.perf_counter() - start)


def _compile(
    model: bytes,
    config: PlanConfig,
    profiles: Sequence[Profile],
    timing_cache: Path | None,
    recorder: Recorder,
    monitor: _Monitor,
) -> tuple[bytes | None, int]:
    """The plan, or None where TensorRT gave none, and the number of layers."""
    try:
        builder = trt.Builder(_LOGGER)
    except TypeError as error:  # the bindings' answer where C++ gives no builder
        raise BackendError(
            f"TensorRT {trt.__version__} cannot start a builder: no usable GPU or driver",
            fix="run `cli.py doctor`; build on the machine that the plan is for",
        ) from error
    # by name, because its number differs between 10 and 11
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    _parse(network, model)
    # after the parser is made, or it would put back a recorder that may be gone when it dies
    builder.error_recorder = recorder
    settings = _settings(builder, config)
    settings.progress_monitor = monitor
    _add_profiles(builder, network, settings, profiles)
    cache = None if timing_cache is None else _load_cache(settings, timing_cache)
    data = _build(builder, network, settings, monitor)
    if data is not None and timing_cache is not None and cache is not None:
        files.write(timing_cache, bytes(memoryview(cache.serialize())))
    return data, int(network.num_layers)


def machine_tag(machine: Machine) -> str:
    """What timings of kernels depend on, as part of a file name."""
    parts = (machine.tensorrt, machine.gpu or "no GPU", machine.compute_capability, machine.cuda)
    return "-".join("".join(c if c.isalnum() or c == "." else "_" for c in p) for p in parts if p)


def cache_name(machine: Machine) -> str:
    """Name of the timing cache's file: TensorRT's version, GPU and CUDA are its key."""
    return f"timing-{machine_tag(machine)}.cache"


def _check_onnx(model: bytes) -> None:
    try:
        graph = onnx.load_from_string(model)
        onnx.checker.check_model(graph)
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise ExportError(
            f"this is no complete ONNX file: {error}", fix="export or copy the bundle again"
        ) from error
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in graph.graph.node):
        check_legal(graph)


def _parse(network: Any, model: bytes) -> None:
    parser = trt.OnnxParser(network, _LOGGER)
    if parser.parse(model):
        return
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    listed = "\n  ".join(
        f"{error.node_operator() or 'graph'} '{error.node_name()}': {error.desc()}"
        for error in errors
    )
    raise ExportError(
        f"TensorRT {trt.__version__} does not take the graph:\n  {listed}",
        fix="write the model without this operation, or run it with another backend",
    )


def _settings(builder: Any, config: PlanConfig) -> Any:
    settings = builder.create_builder_config()
    settings.builder_optimization_level = config.optimization_level
    if config.workspace_mib is not None:
        settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, config.workspace_mib * _MIB)
    if config.detailed:
        settings.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if not config.tf32:
        settings.clear_flag(trt.BuilderFlag.TF32)
    if config.version_compatible:
        settings.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if config.weight_streaming:
        settings.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if config.hardware != "none":
        level = getattr(trt.HardwareCompatibilityLevel, _HARDWARE[config.hardware])
        settings.hardware_compatibility_level = level
    return settings


def _add_profiles(builder: Any, network: Any, settings: Any, profiles: Sequence[Profile]) -> None:
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    inputs = {tensor.name: tuple(tensor.shape) for tensor in tensors}
    check_profiles(inputs, profiles)
    for number, wanted in enumerate(profiles):
        profile = builder.create_optimization_profile()
        for name, shapes in wanted.items():
            profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
        if not profile or settings.add_optimization_profile(profile) < 0:
            raise ExportError(
                f"TensorRT refuses profile {number}: {dict(wanted)}",
                fix="give sizes with min <= opt <= max for every free axis",
            )


def check_profiles(inputs: Mapping[str, Shape], profiles: Sequence[Profile]) -> None:
    """Refuse profiles that do not fit a network's inputs.

    TensorRT takes most such mistakes without a word and fails in the build.

    Args:
        inputs: name -> shape, -1 for a free axis.

    Raises:
        ExportError: a name, a rank, a fixed axis or an order of sizes is wrong, or one is missing.
    """
    free = [name for name, shape in inputs.items() if -1 in shape]
    if free and not profiles:
        raise ExportError(
            f"inputs {free} have free axes, and no profile says how large they may be",
            fix="pass --profile AXIS=MIN:OPT:MAX",
        )
    for number, profile in enumerate(profiles):
        faults = [
            *(f"there is no input '{name}'" for name in profile if name not in inputs),
            *(f"input '{name}' is missing" for name in free if name not in profile),
            *(
                f"input '{name}': {fault}"
                for name, shapes in profile.items()
                if name in inputs
                for fault in _faults(inputs[name], shapes)
            ),
        ]
        if faults:
            known = ", ".join(f"{name} {shape}" for name, shape in inputs.items())
            raise ExportError(
                f"profile {number} does not fit the graph: {'; '.join(faults)}",
                fix=f"the graph's inputs are {known}, with -1 for a free axis",
            )


def _faults(shape: Shape, shapes: ShapeRange) -> list[str]:
    sizes = {"min": shapes.min, "opt": shapes.opt, "max": shapes.max}
    if wrong := [f"{k} has {len(v)} axes" for k, v in sizes.items() if len(v) != len(shape)]:
        return [f"{', '.join(wrong)}, the graph {len(shape)}"]
    faults = []
    for axis, (fixed, *three) in enumerate(
        zip(shape, shapes.min, shapes.opt, shapes.max, strict=True)
    ):
        if fixed >= 0 and set(three) != {fixed}:
            faults.append(f"axis {axis} is {fixed} in the graph, not {three}")
        elif not 1 <= three[0] <= three[1] <= three[2]:
            faults.append(f"axis {axis} needs 1 <= min <= opt <= max, got {three}")
    return faults


def _load_cache(settings: Any, file: Path) -> Any:
    """Attach the timings of earlier builds; those of another machine are left out.

    Returns:
        The cache, which must live as long as the build.
    """
    cache = settings.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    if cache is None or not settings.set_timing_cache(cache, False):
        cache = settings.create_timing_cache(b"")
        settings.set_timing_cache(cache, False)
    return cache


def _build(builder: Any, network: Any, settings: Any, monitor: _Monitor) -> bytes | None:
    """The plan's bytes, or None where TensorRT gave none.

    The build runs in a thread of its own, so that an interrupt reaches the one that waits.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="plan") as pool:
        try:
            plan = pool.submit(builder.build_serialized_network, network, settings).result()
        except BaseException:  # leaving the block waits for the thread
            monitor.stop.set()
            raise
    return None if plan is None else bytes(memoryview(plan))


def _failure(recorder: Recorder, monitor: _Monitor) -> BaseException:
    if monitor.error is not None:
        return monitor.error
    if monitor.stop.is_set():
        return ExportError(f"the build was cancelled in phase '{monitor.phase}'")
    reasons = "\n  ".join(recorder.take()) or "it gave no reason"
    return ExportError(
        f"TensorRT {trt.__version__} cannot build the graph, in phase '{monitor.phase}':\n"
        f"  {reasons}",
        fix="the reason names a layer or a limit: change the model, or raise --workspace",
    )


@dataclass
class _Phase:
    parent: str | None
    num_steps: int
    done: int = 0
    children: dict[str, _Phase] = field(default_factory=dict)

    def fraction(self) -> float:
        """Done of it, 0 to 1; phases inside of it count as the step that they are part of."""
        inner = max((child.fraction() for child in self.children.values()), default=0.0)
        return min(1.0, (self.done + inner) / max(1, self.num_steps))


class _Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # as above
    """Turns nested phases, whose names and order no version promises, into one bar.

    Attributes:
        stop: set, and the next step ends the build.
        phase: the last that began.
        error: what the progress function raised; that ended the build.
    """

    def __init__(self, progress: Progress, stop: threading.Event) -> None:
        trt.IProgressMonitor.__init__(self)
        self.stop = stop
        self.phase = "start"
        self.error: BaseException | None = None
        self._progress = progress
        self._lock = threading.Lock()
        self._phases: dict[str, _Phase] = {}
        self._shown = -1

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        with self._lock:
            self.phase = phase_name
            phase = self._phases[phase_name] = _Phase(parent_phase, num_steps)
            if parent_phase in self._phases:
                self._phases[parent_phase].children[phase_name] = phase

    def step_complete(self, phase_name: str, step: int) -> bool:
        with self._lock:
            if phase := self._phases.get(phase_name):
                phase.done = max(phase.done, step + 1)
                phase.children.clear()  # they were part of this step
            roots = [p.fraction() for p in self._phases.values() if p.parent is None]
            shown = int(_PROGRESS_STEPS * max(roots, default=0.0))
            if shown > self._shown:
                self._shown = shown
                try:
                    self._progress(shown, _PROGRESS_STEPS)
                except BaseException as error:  # TensorRT would swallow it
                    self.error = error
        return self.error is None and not self.stop.is_set()

    def finish(self) -> None:
        """Fill the bar: TensorRT skips steps."""
        self._progress(_PROGRESS_STEPS, _PROGRESS_STEPS)

    def phase_finish(self, phase_name: str) -> None:
        with self._lock:
            self._phases.pop(phase_name, None)
