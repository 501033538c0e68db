"""What a TensorRT plan was built from and on, and whether it may be loaded here.

A plan is compiled for one GPU by one version of TensorRT. The file itself is plain and tells
nothing, so the manifest does, and a plan that does not belong here is refused by name before
TensorRT sees it.

Source: NVIDIA TensorRT documentation, "Engine Compatibility".
"""

from __future__ import annotations

import importlib
import json
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engineworks.runtime import gpu
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.engines import BACKENDS
from engineworks.runtime.errors import BackendError, BundleError, EngineError, UsageError

# precision -> the variant that is the plan of it, and the ONNX variant that it is built from
PLANS: dict[str, tuple[str, str]] = {
    "float": ("float-plan", "float"),
    "fp16": ("fp16-plan", "fp16"),
    "bf16": ("bf16-plan", "bf16"),
    "int8": ("int8-plan", "int8"),
}
PLAN_VARIANTS = frozenset(plan for plan, _ in PLANS.values())
# under this key of the manifest's provenance: graph -> variant -> PlanOrigin
PROVENANCE = "plans"

# axis name -> (min, opt, max) of a free axis
AxisRanges = dict[str, tuple[int, int, int]]
# of an axis ``batch`` that no profile names
DEFAULT_BATCH = (1, 8, 32)
Shape = tuple[int, ...]

_AMPERE = (8, 0)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PlanConfig(_Part):
    """What a plan is asked to be; the rebuild command repeats it.

    Attributes:
        profiles: optimisation profiles: per free axis the smallest size, the one that kernels are
            chosen for, and the largest.
        workspace_mib: GPU memory in MiB that kernels may use; None lets them have all.
        optimization_level: 0 (fast build) to 5 (long search).
        tf32: whether float32 products may be rounded to 10 bits of mantissa, as cuDNN does.
        detailed: layers with types and formats in the plan, for inspection and profiling.
        version_compatible: the plan also runs on later versions of TensorRT, somewhat slower.
        hardware: which other GPUs may run it: ``none``, those of the ``same-compute-capability``,
            or ``ampere-plus``, all from compute capability 8.0 on.
        weight_streaming: weights may stay in host memory; excludes CUDA graphs.
    """

    profiles: tuple[AxisRanges, ...] = ()
    workspace_mib: int | None = Field(default=None, ge=1)
    optimization_level: int = Field(default=3, ge=0, le=5)
    tf32: bool = True
    detailed: bool = True
    version_compatible: bool = False
    hardware: Literal["none", "same-compute-capability", "ampere-plus"] = "none"
    weight_streaming: bool = False

    def arguments(self) -> list[str]:
        """The command line's arguments that ask for this."""
        words = []
        for profile in self.profiles:
            axes = [f"{axis}={':'.join(map(str, sizes))}" for axis, sizes in profile.items()]
            words += ["--profile", ",".join(axes)]
        if self.workspace_mib is not None:
            words += ["--workspace", str(self.workspace_mib)]
        if self.optimization_level != 3:
            words += ["--optimization", str(self.optimization_level)]
        if self.hardware != "none":
            words += ["--hardware-compatible", self.hardware]
        flags = {
            "--no-tf32": not self.tf32,
            "--terse": not self.detailed,
            "--version-compatible": self.version_compatible,
            "--weight-streaming": self.weight_streaming,
        }
        return [*words, *(flag for flag, wanted in flags.items() if wanted)]


def parse_profile(text: str) -> AxisRanges:
    """``batch=1:8:32,height=64:256:512`` -> ranges.

    Raises:
        UsageError: not of that form, or sizes that do not rise from 1.
    """
    ranges: AxisRanges = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\w+)=(\d+):(\d+):(\d+)\s*", part)
        if found is None:
            raise UsageError(
                f"a profile is written AXIS=MIN:OPT:MAX,..., got {text!r}",
                fix="for example --profile batch=1:8:32",
            )
        low, usual, high = (int(size) for size in found.groups()[1:])
        if not 1 <= low <= usual <= high:
            raise UsageError(
                f"a profile needs 1 <= MIN <= OPT <= MAX, got {part!r}",
                fix="OPT is the size to be fast at",
            )
        if found[1] in ranges:
            raise UsageError(f"profile {text!r} names axis '{found[1]}' twice")
        ranges[found[1]] = (low, usual, high)
    return ranges


@dataclass(frozen=True)
class ShapeRange:
    """Shapes of one input in one optimisation profile, all axes, fixed ones included."""

    min: Shape
    opt: Shape
    max: Shape


Profile = Mapping[str, ShapeRange]  # input name -> its shapes


class Machine(_Part):
    """What decides whether a plan runs; the GPU's fields are empty where there is none."""

    tensorrt: str
    platform: str
    gpu: str = ""
    compute_capability: str = ""
    driver: str = ""
    cuda: str = ""


class PlanOrigin(_Part):
    """What a plan was built from and on.

    Attributes:
        source: the ONNX variant.
        source_sha256: of its file.
        machine: where it was built.
        config: how.
    """

    source: str
    source_sha256: str
    machine: Machine
    config: PlanConfig


def this_machine() -> Machine:
    """Describe this machine, with the TensorRT that is imported here.

    Raises:
        BackendError: TensorRT is not here, or not all of it.
    """
    row = BACKENDS["tensorrt"]
    try:
        tensorrt = str(importlib.import_module(row.package).__version__)
    except ImportError as error:  # its libraries are looked for when it is imported
        raise BackendError(f"TensorRT cannot be loaded: {error}", fix=row.install) from error
    found = gpu.find()
    where = f"{sys.platform}-{platform.machine()}"
    if found is None:
        return Machine(tensorrt=tensorrt, platform=where)
    return Machine(
        tensorrt=tensorrt,
        platform=where,
        gpu=found.name,
        compute_capability=found.compute_capability,
        driver=found.driver,
        cuda=found.cuda,
    )


def origin_of(bundle: Bundle, graph: str, variant: str) -> PlanOrigin:
    """What the manifest says about a plan.

    Raises:
        BundleError: it says nothing, or not in this form.
    """
    known = bundle.manifest.provenance.get(PROVENANCE, {}).get(graph, {})
    try:
        return PlanOrigin.model_validate_json(json.dumps(known.get(variant)))
    except ValidationError as error:
        raise BundleError(
            f"bundle {bundle.root} does not say what '{variant}' of graph '{graph}' was built on",
            fix="build it again with `cli.py export BUNDLE --plan ...`",
        ) from error


def check_origin(
    bundle: Bundle,
    graph: str,
    variant: str,
    here: Machine | None = None,
    *,
    host_code: bool = False,
) -> PlanOrigin:
    """Refuse a plan that was built elsewhere, or from another graph than the bundle's.

    Args:
        variant: e.g. ``int8-plan``.
        here: the machine that is to run it; this one where not given.
        host_code: whether the caller lets it bring program code of its own. A bundle cannot allow
            that for itself.

    Returns:
        What it was built on and how.

    Raises:
        BundleError: see ``origin_of``.
        EngineError: it does not belong here; the fix is the command that builds it anew.
        BackendError: see ``this_machine``.
    """
    origin = origin_of(bundle, graph, variant)
    reason = _source_changed(bundle, graph, origin) or why_not(origin, here or this_machine())
    if reason:
        raise EngineError(
            f"'{variant}' of graph '{graph}' cannot be loaded here: {reason}",
            fix=f"build it here: {rebuild_command(bundle, variant, origin)}",
        )
    if origin.config.version_compatible and not host_code:
        raise EngineError(
            f"'{variant}' of graph '{graph}' brings program code of its own, as version-compatible "
            "plans do",
            fix="pass --allow-host-code if you built it yourself, or build it without "
            "--version-compatible",
        )
    return origin


def rebuild_command(bundle: Bundle, variant: str, origin: PlanOrigin) -> str:
    """The command that builds a plan of the bundle anew, in place."""
    precision = next(name for name, (plan, _) in PLANS.items() if plan == variant)
    root = str(bundle.root)
    words = ["cli.py", "export", root, "--out", root, "--exist-ok", "--plan", precision]
    return shlex.join([*words, *origin.config.arguments()])


def _source_changed(bundle: Bundle, graph: str, origin: PlanOrigin) -> str | None:
    manifest = bundle.manifest
    file = manifest.graphs[graph].variants.get(origin.source)
    if file is not None and manifest.files[file].sha256 == origin.source_sha256:
        return None
    return f"the graph '{origin.source}' that it was built from is not the bundle's any more"


def why_not(origin: PlanOrigin, here: Machine) -> str | None:
    """None where a plan can be loaded on a machine, else the reason in words."""
    built, config = origin.machine, origin.config
    if not built.gpu:
        return "it was built without a GPU, for a check, and no GPU can run it"
    if built.platform != here.platform:
        return f"it was built on {built.platform}, this is {here.platform}"
    if built.tensorrt != here.tensorrt and not (
        config.version_compatible and _numbers(built.tensorrt) <= _numbers(here.tensorrt)
    ):
        older = ", and runs on no older one" if config.version_compatible else ""
        return f"it was built by TensorRT {built.tensorrt}{older}, this is {here.tensorrt}"
    if not here.gpu:
        return f"it was built on an {built.gpu}, and no GPU is found here"
    if not _takes(config, built, here):
        return (
            f"it was built on {built.gpu} (compute capability {built.compute_capability}), "
            f"this is {here.gpu} ({here.compute_capability})"
        )
    return None


def _takes(config: PlanConfig, built: Machine, here: Machine) -> bool:
    if config.hardware == "ampere-plus":
        return _numbers(here.compute_capability) >= _AMPERE
    same = built.compute_capability == here.compute_capability
    return same and (config.hardware == "same-compute-capability" or built.gpu == here.gpu)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
