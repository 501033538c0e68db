"""One code for TensorRT 10 and 11: no name that 11 removed stands in what we ship."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = [
    ROOT / "cli.py",
    *sorted(
        path
        for package in ("runtime", "calibration", "batch", "training", "export")
        for path in (ROOT / package).rglob("*.py")
    ),
]

# Source: NVIDIA TensorRT documentation, "TensorRT 10.x to 11.x: removed Python APIs"; the names
# that the bindings of 10.16 have and those of 11.4 lack.
_REMOVED = re.compile(
    r"""
    EXPLICIT_BATCH | OBEY_PRECISION_CONSTRAINTS | PREFER_PRECISION_CONSTRAINTS
    | REJECT_EMPTY_ALGORITHMS | WEIGHTLESS | DIRECT_IO
    | IInt8\w* | CalibrationAlgoType | int8_calibrator | [sg]et_calibration_profile
    | QuantizationFlag | quantization_flags | (set|get|clear)_quantization_flag
    | precision_is_set | reset_precision | (set|reset)_output_type | output_type_is_set
    | dynamic_range | (set|get|reset)_dynamic_range
    | platform_has_\w+ | IAlgorithm\w* | algorithm_selector
    | device_memory_size | get_device_memory_size_for_profile
    | create_execution_context_without_device_memory | has_implicit_batch_dimension
    | (minimum_)?weight_streaming_budget | all_shape_inputs_specified
    | IStreamReader | supports_model | parse_with_weight_descriptors
    | PROFILE_SHARING_0806 | CUBLAS(_LT)? | CUDNN
    """,
    re.VERBOSE,
)
# these are words of other things too: only where they are members of the builder's flags
_REMOVED_FLAGS = {"FP16", "BF16", "INT8", "FP8", "INT4", "FP4"}


def removed(source: str) -> Iterator[str]:
    """Names and texts of a module that only TensorRT 10 knows."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            name, owner = node.attr, ast.unparse(node.value)
            if name in _REMOVED_FLAGS and owner.endswith("BuilderFlag"):
                yield f"{owner}.{name}"
        elif isinstance(node, ast.Name):
            name = node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value  # getattr(trt, "...")
        else:
            continue
        if _REMOVED.fullmatch(name):
            yield name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_module_uses_a_name_that_tensorrt_11_removed(path: Path) -> None:
    assert list(removed(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "config.set_flag(trt.BuilderFlag.INT8)",
        "network = builder.create_network(1 << int(Creation.EXPLICIT_BATCH))",
        "config.int8_calibrator = c",
        "size = engine.device_memory_size",
        "class C(trt.IInt8EntropyCalibrator2): ...",
        "getattr(builder, 'platform_has_fast_int8')",
        "tensor.set_dynamic_range(-1, 1)",
    ],
)
def test_the_search_finds_what_it_is_for(line: str) -> None:
    assert list(removed(line))


@pytest.mark.parametrize(
    "line",
    [
        "engine.device_memory_size_v2",
        "engine.weight_streaming_budget_v2 = 0",
        "parser.supports_model_v2(model)",
        "config.set_flag(trt.BuilderFlag.TF32)",
        "TensorProto.INT8",
    ],
)
def test_the_search_leaves_what_both_versions_have(line: str) -> None:
    assert list(removed(line)) == []
