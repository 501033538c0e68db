"""Every graph of bundles through TensorRT's builder: each precision, with fixed and with free axes.

python -m tests.benchmarks.plans BUNDLE_OR_ONNX... [--profile AXIS=MIN:OPT:MAX,...]

A bare ONNX file is float32; its 16-bit graphs are written here. Bundles bring theirs, by
``cli.py export --int8 --half fp16,bf16``. With a builder for the CPU the verdicts count, and the
seconds say nothing about a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import onnx
import tensorrt

from engineworks.export.halve import TYPES, halve
from engineworks.export.plan import build_plan
from engineworks.runtime.bundle import read
from engineworks.runtime.errors import EngineworksError
from engineworks.runtime.plans import (
    DEFAULT_BATCH,
    PLANS,
    AxisRanges,
    PlanConfig,
    Profile,
    ShapeRange,
    parse_profile,
)


@dataclass(frozen=True)
class Graph:
    name: str
    variants: Mapping[str, onnx.ModelProto]  # precision -> graph


def graphs(path: Path) -> Iterator[Graph]:
    if path.is_file():
        exact = onnx.load(path)
        yield Graph(path.stem, {"float": exact, **{kind: halve(exact, kind) for kind in TYPES}})
        return
    bundle = read(path)
    for name, entry in bundle.manifest.graphs.items():
        variants = {
            precision: onnx.load(bundle.path(entry.variants[source]))
            for precision, (_, source) in PLANS.items()
            if source in entry.variants
        }
        yield Graph(f"{bundle.manifest.system} `{name}`", variants)


def free_axes(model: onnx.ModelProto) -> dict[str, tuple[int | str, ...]]:
    """Input -> its axes."""
    return {
        value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in model.graph.input
    }


def profile_of(model: onnx.ModelProto, ranges: AxisRanges) -> Profile:
    def shape(axes: tuple[int | str, ...], which: int) -> tuple[int, ...]:
        return tuple(ranges[axis][which] if isinstance(axis, str) else axis for axis in axes)

    return {
        name: ShapeRange(*(shape(axes, which) for which in range(3)))
        for name, axes in free_axes(model).items()
    }


def fixed(model: onnx.ModelProto, ranges: AxisRanges) -> onnx.ModelProto:
    """The graph with every free axis at the size to be fast at."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for value in [*result.graph.input, *result.graph.output]:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param in ranges:
                axis.dim_value = ranges[axis.dim_param][1]
            elif axis.dim_param:
                axis.Clear()  # of an output: what the inputs make of it
    del result.graph.value_info[:]  # their axes are numbers now as well
    return onnx.shape_inference.infer_shapes(result)


def text(ranges: AxisRanges) -> str:
    return ", ".join(f"{axis} {low} to {high}" for axis, (low, _, high) in ranges.items())


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--profile", "profiles", multiple=True, help="Of the axes that a graph has of it.")
def main(paths: tuple[Path, ...], profiles: tuple[str, ...]) -> None:
    """Print the table."""
    known: AxisRanges = {"batch": DEFAULT_BATCH}
    for profile in profiles:
        known.update(parse_profile(profile))
    click.echo(f"TensorRT {tensorrt.__version__}\n")
    click.echo("| graph | precision | axes | nodes | layers | plan, MiB | build, s | verdict |")
    click.echo("|---|---|---|---|---|---|---|---|")
    for graph in (graph for path in paths for graph in graphs(path)):
        for precision, model in graph.variants.items():
            axes = {a for shape in free_axes(model).values() for a in shape if isinstance(a, str)}
            ranges = {axis: sizes for axis, sizes in known.items() if axis in axes}
            for what, each, wanted in (
                ("fixed", fixed(model, ranges), []),
                (text(ranges), model, [profile_of(model, ranges)]),
            ):
                cells = "| | | "
                try:
                    plan = build_plan(each.SerializeToString(), PlanConfig(), wanted)
                    verdict = "built"
                    mib = len(plan.data) / 2**20
                    cells = f"{plan.num_layers} | {mib:.1f} | {plan.seconds:.1f}"
                except EngineworksError as error:
                    verdict = error.message.replace("\n", " ")
                click.echo(
                    f"| {graph.name} | {precision} | {what} | {len(model.graph.node)} | {cells} "
                    f"| {verdict} |"
                )


if __name__ == "__main__":
    main()
