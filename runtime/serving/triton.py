"""A bundle as a model repository of Triton: the whole system, and its graphs by themselves.

The whole system is a model of Triton's Python backend, whose interpreter needs engineworks; see
``backend``. Texts and files travel there as UINT8 with an axis more, filled up with spaces (files:
with anything): under NumPy 2 the backend's BYTES are empty, at least up to Triton 2.51.

Source: Triton Inference Server, "Model Repository" and "Model Configuration" (model_config.proto).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np

from engineworks.runtime.bundle import MANIFEST_NAME, SIGNATURE_NAME, Bundle, GraphEntry
from engineworks.runtime.claims import claim
from engineworks.runtime.errors import BundleError
from engineworks.runtime.files import NewFolder
from engineworks.runtime.plans import PLAN_VARIANTS
from engineworks.runtime.serving.tensors import Tensor, blank, in_letters, inputs, outputs
from engineworks.runtime.systems import open_system
from engineworks.runtime.tensors import TensorSpec

_MAX_BATCH = 8
_MAX_DELAY_US = 500
_MODEL = '''"""A system of engineworks; what it does is in engineworks.runtime.serving.backend."""

import os
import site

# the interpreter of the backend may leave PYTHONPATH out
for folder in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
    site.addsitedir(folder)

from engineworks.runtime.serving.backend import TritonPythonModel  # noqa: E402, F401
'''
_TYPES = {
    "bool": "TYPE_BOOL", "float16": "TYPE_FP16", "float32": "TYPE_FP32", "float64": "TYPE_FP64",
    "int8": "TYPE_INT8", "int16": "TYPE_INT16", "int32": "TYPE_INT32", "int64": "TYPE_INT64",
    "uint8": "TYPE_UINT8", "uint16": "TYPE_UINT16", "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64",
}  # fmt: skip
_OF_PROTOCOL = {"FP32": "float32", "FP64": "float64", "BOOL": "bool", "INT64": "int64"}


def write_repository(
    bundle: Bundle,
    out: Path,
    name: str,
    *,
    exist_ok: bool = False,
) -> list[str]:
    """Write a model repository.

    Args:
        bundle: verified; it is copied whole, under its own hashes.
        out: folder to make; a model each is a folder in it.
        name: of the model that is the whole system; those of its graphs begin with it.
        exist_ok: replace what ``out`` holds.

    Returns:
        Names of the models, the whole system first.

    Raises:
        BundleError: ``out`` exists.
        EngineworksError: the bundle cannot be opened here.
    """
    with claim(out):
        if out.exists() and not exist_ok:
            raise BundleError(f"{out} exists", fix="choose another --out, or pass --exist-ok")
        with open_system(bundle) as system:
            (result,) = system.infer([blank(system.reader, bundle.manifest.preprocess.size)])
            given = [in_letters(tensor) for tensor in inputs(system.reader)]
            told = [in_letters(tensor) for tensor in outputs(type(result))]
        made = {name: _system_config(name, given, told)}
        with NewFolder(out.parent) as new:
            new.write(f"{name}/1/model.py", _MODEL)
            for file in [MANIFEST_NAME, *bundle.manifest.files]:
                new.copy(f"{name}/1/bundle/{file}", bundle.root / PurePosixPath(file))
            if (bundle.root / SIGNATURE_NAME).is_file():
                new.copy(f"{name}/1/bundle/{SIGNATURE_NAME}", bundle.root / SIGNATURE_NAME)
            for graph, entry in bundle.manifest.graphs.items():
                for variant, file in entry.variants.items():
                    model = f"{name}-{graph}-{variant}"
                    plan = variant in PLAN_VARIANTS
                    made[model] = _graph_config(model, entry, plan)
                    target = f"{model}/1/model.{'plan' if plan else 'onnx'}"
                    new.copy(target, bundle.root / PurePosixPath(file))
            for model, config in made.items():
                new.write(f"{model}/config.pbtxt", config)
            new.place(out, replace=exist_ok)
    return list(made)


def _system_config(name: str, given: Iterable[Tensor], told: Iterable[Tensor]) -> str:
    parts = [
        f"name: {json.dumps(name)}",
        'backend: "python"',
        f"max_batch_size: {_MAX_BATCH}",
        *(_tensor("input", t.name, _type(t), t.shape[1:], optional=True) for t in given),
        *(_tensor("output", t.name, _type(t), t.shape[1:]) for t in told),
        f"dynamic_batching {{ max_queue_delay_microseconds: {_MAX_DELAY_US} }}",
        # one system: its threads are all that there are
        "instance_group [ { count: 1 kind: KIND_CPU } ]",
        *(_parameter(key, value) for key, value in _PARAMETERS.items()),
    ]
    return "\n".join(parts) + "\n"


# of engineworks.runtime.serving.backend, for whoever runs the server
_PARAMETERS = {"backend": "auto", "precision": "auto", "threads": ""}


def _parameter(key: str, value: str) -> str:
    return f"parameters {{ key: {json.dumps(key)} value {{ string_value: {json.dumps(value)} }} }}"


def _type(tensor: Tensor) -> str:
    return _TYPES[_OF_PROTOCOL.get(tensor.datatype, tensor.datatype.lower())]


def _tensor(
    field: str, name: str, kind: str, dims: Iterable[int], *, optional: bool = False
) -> str:
    # no axis is an axis of one to Triton
    shape = [*dims]
    more = " optional: true" if optional else ""
    if not shape:
        shape, more = [1], " reshape: { shape: [ ] }"
    return f"{field} [ {{ name: {json.dumps(name)} data_type: {kind} dims: {shape}{more} }} ]"


def _graph_config(name: str, entry: GraphEntry, plan: bool) -> str:
    """Batches are joined where the first axis of all tensors is one and the same free one."""
    specs = [*entry.inputs.values(), *entry.outputs.values()]
    firsts = {spec.shape[0] if spec.shape else None for spec in specs}
    batched = len(firsts) == 1 and isinstance(next(iter(firsts)), str)
    parts = [
        f"name: {json.dumps(name)}",
        f'platform: "{"tensorrt_plan" if plan else "onnxruntime_onnx"}"',
        f"max_batch_size: {_MAX_BATCH if batched else 0}",
        *(_of_graph("input", n, spec, batched) for n, spec in entry.inputs.items()),
        *(_of_graph("output", n, spec, batched) for n, spec in entry.outputs.items()),
    ]
    if batched:
        parts.append(f"dynamic_batching {{ max_queue_delay_microseconds: {_MAX_DELAY_US} }}")
    return "\n".join(parts) + "\n"


def _of_graph(field: str, name: str, spec: TensorSpec, batched: bool) -> str:
    dims = [axis if isinstance(axis, int) else -1 for axis in spec.shape]
    return _tensor(field, name, _TYPES[np.dtype(spec.dtype).name], dims[1:] if batched else dims)
