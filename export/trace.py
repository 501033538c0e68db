"""A training run becomes a float ONNX bundle: the last place that needs torch.

The only call of ``torch.onnx`` in the project. What leaves here has been compared with torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from filecmp import cmp
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import torch

from engineworks.export import passes
from engineworks.export.parity import Parity, check, check_shapes
from engineworks.export.systems import Source, recipe
from engineworks.runtime import bundle
from engineworks.runtime.bundle import Bundle, GraphEntry, Manifest
from engineworks.runtime.engines import open_engine
from engineworks.runtime.errors import ExportError, RunError, UsageError
from engineworks.runtime.files import scratch
from engineworks.runtime.tensors import Array, TensorSpec
from engineworks.training.run import Run, Weights, open_run
from engineworks.training.task import Progress
from engineworks.training.train import conclude

_PACKAGES = ("engineworks", "torch", "timm", "onnx", "onnxscript", "onnxslim", "onnxruntime")


def trace(
    run: Path,
    out: Path,
    *,
    weights: Weights | None = None,
    data: Path | None = None,
    progress: Progress | None = None,
    exist_ok: bool = False,
) -> Bundle:
    """Export a run that has finished or was stopped.

    Args:
        run: folder that ``training.train`` wrote.
        out: the bundle to make.
        weights: of the best or the last epoch; None takes those that training concluded with.
        data: what the run was trained on, to conclude it with other weights, or as it is where it
            was killed; see ``training.train.conclude``.
        progress: called with (what, done, of).
        exist_ok: replace a bundle that is already there.

    Returns:
        The bundle, with variant ``float`` of every graph.

    Raises:
        RunError: no run, or one that must be concluded and ``data`` is not given.
        ExportError: torch cannot express the model as ONNX.
        ParityError: ONNX Runtime answers otherwise than torch.
        BundleError: ``out`` is in the way.
    """
    info = _concluded(open_run(run), weights, data, progress).info
    record = {"run": info.model_dump(mode="json", exclude={"results", "status"})}
    return _write(info.system, run, out, record, progress=progress, exist_ok=exist_ok)


def _concluded(
    run: Run, weights: Weights | None, data: Path | None, progress: Progress | None
) -> Run:
    """The run with all that an export of these weights needs, made of the data where it must be."""
    which = weights or run.info.weights
    if run.info.status != "running":
        if which == run.info.weights or cmp(run.weights(which), run.weights(), shallow=False):
            return run
        problem = f"the borders of run {run.root} are those of its {run.info.weights} weights"
    else:
        problem = f"run {run.root} is not finished"
    if data is None:
        raise RunError(
            problem,
            fix="pass --data, what it was trained on, to export it as it is; or go on with "
            "`cli.py train --resume`",
        )
    return conclude(run.root, data, which, progress=progress)


def trace_prepared(
    system: str,
    prepare: Callable[[Path], Mapping[str, Any]],
    out: Path,
    *,
    progress: Progress | None = None,
    exist_ok: bool = False,
) -> Bundle:
    """Export a system that has no run.

    Args:
        prepare: leaves in a folder what a run would hold; gives where that comes from.
        out, progress, exist_ok: as of ``trace``.

    Raises:
        ExportError, ParityError, BundleError: as ``trace``.
    """
    with scratch(out.parent) as folder:
        record = {system: prepare(folder)}
        return _write(system, folder, out, record, progress=progress, exist_ok=exist_ok)


def trace_named(
    system: str,
    name: str,
    options: Mapping[str, str],
    out: Path,
    *,
    progress: Progress | None = None,
    exist_ok: bool = False,
) -> Bundle:
    """Export SYSTEM:NAME, e.g. a net of timm alone.

    Args:
        name, options: as the recipe's ``prepare`` takes them.
        out, progress, exist_ok: as of ``trace``.

    Raises:
        UsageError: options that cannot be read, or a system that is exported from a run.
        ConfigError, WeightsError: what is named is not there.
        ExportError, ParityError, BundleError: as ``trace``.
    """
    rules = recipe(system)
    if rules.prepare is None:
        raise UsageError(f"'{system}' is exported from a run", fix="give the folder of its run")
    prepare = partial(rules.prepare, name=name, options=options)
    return trace_prepared(system, prepare, out, progress=progress, exist_ok=exist_ok)


def _write(
    system: str,
    folder: Path,
    out: Path,
    record: Mapping[str, Any],
    *,
    progress: Progress | None,
    exist_ok: bool,
) -> Bundle:
    """Trace what the system's recipe finds in ``folder``, compare it with torch, write a bundle."""
    report: Progress = progress or (lambda what, done, of: None)
    rules = recipe(system)
    contents = rules.contents(folder)
    sources = rules.graphs(folder)
    with scratch(out.parent) as work:
        files = {path.name: path for path in contents.assets.values()}
        entries: dict[str, GraphEntry] = {}
        parities: dict[str, Any] = {}
        for i, (name, source) in enumerate(sources.items()):
            report(f"tracing {name}", i, len(sources))
            model = passes.prepare(to_onnx(source))
            outputs = _specs(model.graph.output)
            check_shapes(outputs, source.shapes)
            path = work / f"{name}.onnx"
            onnx.save(model, path)
            worst = compare_with_torch(source, path, tolerance=source.tolerance or rules.tolerance)
            parities[name] = {output: p.model_dump() for output, p in worst.items()}
            files[path.name] = path
            keep = rules.keep_float if source.keep_float is None else source.keep_float
            entries[name] = GraphEntry(
                inputs=_specs(model.graph.input),
                outputs=outputs,
                variants={"float": path.name},
                keep_float=keep.model_dump(mode="json"),
            )
            report(f"tracing {name}", i + 1, len(sources))
        manifest = Manifest(
            system=system,
            graphs=entries,
            preprocess=contents.preprocess,
            labels=contents.labels,
            thresholds=dict(contents.thresholds),
            params=dict(contents.params),
            assets={role: path.name for role, path in contents.assets.items()},
            gate=dict(rules.gate),
            provenance={
                **record,
                "versions": {package: metadata.version(package) for package in _PACKAGES},
            },
            reports={"parity": {"torch-float": parities}},
        )
        return bundle.write(out, manifest, files, replace=exist_ok)


def to_onnx(source: Source) -> onnx.ModelProto:
    """One traced graph, as torch writes it.

    Raises:
        ExportError: torch cannot express the module as ONNX; its first line is kept.
    """
    axes = [
        {axis: torch.export.Dim(free) for axis, free in source.free.get(name, {}).items()}
        for name in source.inputs
    ]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # inputs may share an axis: torch says of each but one that its name is known
            warnings.filterwarnings("ignore", "# The axis name", UserWarning)
            program = torch.onnx.export(
                source.module,
                source.examples[0],
                dynamo=True,
                verbose=False,
                opset_version=passes.MIN_OPSET,
                input_names=source.inputs,
                output_names=source.outputs,
                dynamic_shapes=tuple(axes),
                external_data=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(
            f"torch cannot express the model as ONNX: {str(error).strip().splitlines()[0]}",
            fix="replace the operation that its traceback names",
        ) from error
    assert program is not None
    return program.model_proto


def compare_with_torch(source: Source, path: Path, *, tolerance: float) -> dict[str, Parity]:
    """The worst of all examples, per output; of chosen candidates, what they are chosen from.

    Raises:
        ParityError: beyond the tolerance.
    """
    worst: dict[str, Parity] = {}
    compared = passes.before_choice(onnx.load(path)).SerializeToString()
    with closing(open_engine(compared, "ort")) as engine:
        names = [name for name in source.outputs if name in engine.outputs]
        for example in source.examples:
            feeds = {n: t.numpy() for n, t in zip(source.inputs, example, strict=True)}
            want = dict(zip(names, _run_torch(source, example), strict=True))
            parities = check(engine.run(feeds), want, tolerance=tolerance)
            for name, parity in parities.items():
                if name not in worst or parity.max_rel > worst[name].max_rel:
                    worst[name] = parity
    return worst


def _run_torch(source: Source, example: tuple[torch.Tensor, ...]) -> list[Array]:
    with torch.no_grad():
        result = (source.before_choice or source.module)(*example)
    values = (result,) if isinstance(result, torch.Tensor) else result
    return [value.numpy() for value in values]


def _specs(values: Iterable[onnx.ValueInfoProto]) -> dict[str, TensorSpec]:
    """Tensor specs of a graph's inputs or outputs; free axes keep their names."""
    specs = {}
    for value in values:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        shape = tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim)
        specs[value.name] = TensorSpec(dtype=dtype.name, shape=shape)
    return specs
