"""What a system demands of its bundle, checked before a graph or an asset of it is opened.

The manifest may have been written by anyone: a digest that fits says nothing about sense. So each
system states its graphs, thresholds and assets here, and what it computes with is held against
that once, at the border, instead of wherever it would break.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from engineworks.runtime.bundle import Bundle, GraphEntry
from engineworks.runtime.engines import Engine
from engineworks.runtime.errors import BundleError, EngineError
from engineworks.runtime.preprocess import PlanesSpec, PreprocessSpec
from engineworks.runtime.tensors import Array, Feeds, TensorSpec

# of a tensor: the letter of each axis, see runtime.tensors; ``3`` stands for itself
Axes: TypeAlias = str


@dataclass(frozen=True)
class Signature:
    """Tensors of a graph, all float32 where ``integers`` does not name them.

    Attributes:
        inputs: exactly these.
        outputs: at least these.
        integers: outputs of any whole numbers.
    """

    inputs: Mapping[str, Axes]
    outputs: Mapping[str, Axes]
    integers: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Contract:
    """What a system demands of its bundle.

    Attributes:
        preprocess: the kind of its preprocessing.
        graphs: exactly these.
        sizes: what letters of axes must be, where the graph fixes them.
        thresholds, assets: at least these.
    """

    preprocess: type[PreprocessSpec] | type[PlanesSpec]
    graphs: Mapping[str, Signature]
    sizes: Mapping[str, int]
    thresholds: tuple[str, ...] = ()
    assets: tuple[str, ...] = ()

    def check(self, bundle: Bundle) -> None:
        """Refuse a bundle that does not hold what the system reads.

        Raises:
            BundleError: names what is missing, or does not fit.
        """
        manifest = bundle.manifest
        if not isinstance(manifest.preprocess, self.preprocess):
            raise _broken(bundle, f"its preprocessing is a {type(manifest.preprocess).__name__}")
        if (found := set(manifest.graphs)) != set(self.graphs):
            raise _broken(bundle, f"it has the graphs {sorted(found)}, not {sorted(self.graphs)}")
        sizes = {**self.sizes, "3": 3}
        if isinstance(manifest.preprocess, PreprocessSpec):
            channels = len(manifest.preprocess.mean)
            if channels != 3:
                raise _broken(bundle, f"its preprocessing is for {channels} channels")
        for name, signature in self.graphs.items():
            _check_graph(bundle, name, manifest.graphs[name], signature, sizes)
        for kind, wanted, given in (
            ("threshold", self.thresholds, set(manifest.thresholds)),
            ("asset", self.assets, set(manifest.assets)),
        ):
            if missing := sorted(set(wanted) - given):
                raise _broken(bundle, f"it has no {kind} '{missing[0]}'")


def _check_graph(
    bundle: Bundle, name: str, graph: GraphEntry, signature: Signature, sizes: Mapping[str, int]
) -> None:
    if set(graph.inputs) != set(signature.inputs):
        raise _broken(bundle, f"graph '{name}' has the inputs {sorted(graph.inputs)}")
    if missing := sorted(set(signature.outputs) - set(graph.outputs)):
        raise _broken(bundle, f"graph '{name}' has no output '{missing[0]}'")
    for tensor, axes in {**signature.inputs, **signature.outputs}.items():
        spec = graph.inputs[tensor] if tensor in signature.inputs else graph.outputs[tensor]
        whole = "int" in spec.dtype or spec.dtype == "float32"
        fits = whole if tensor in signature.integers else spec.dtype == "float32"
        fits = fits and len(spec.shape) == len(axes)
        for letter, axis in zip(axes, spec.shape, strict=False):
            fits = fits and (isinstance(axis, str) or axis == sizes.get(letter, axis))
        if not fits:
            known = ", ".join(f"{k} = {v}" for k, v in sizes.items() if k in axes and k != "3")
            raise _broken(
                bundle,
                f"'{tensor}' of graph '{name}' is {spec.dtype} {spec.describe()}, and not "
                f"({', '.join(axes)}){f' with {known}' if known else ''}",
            )


def _broken(bundle: Bundle, what: str) -> BundleError:
    return BundleError(
        f"bundle {bundle.root} is none of the system '{bundle.manifest.system}': {what}",
        fix="export the bundle again",
    )


class CheckedEngine:
    """An engine whose tensors are held against what the manifest says of its graph.

    Raises:
        EngineError: the graph's inputs and outputs are not those of the manifest.
    """

    def __init__(self, engine: Engine, name: str, graph: GraphEntry) -> None:
        self.backend = engine.backend
        self.inputs: Mapping[str, TensorSpec] = engine.inputs
        self.outputs: Mapping[str, TensorSpec] = engine.outputs
        self._engine = engine
        self._name = name
        self._graph = graph
        if set(graph.inputs) != set(engine.inputs) or set(graph.outputs) - set(engine.outputs):
            raise self._other(f"{sorted(engine.inputs)} -> {sorted(engine.outputs)}")
        for tensor, spec in graph.inputs.items():
            own = engine.inputs[tensor]
            if own.dtype != spec.dtype or not _agree(own.shape, spec.shape):
                raise self._other(f"'{tensor}' is {own.dtype} {own.describe()}")

    def run(self, feeds: Feeds, *, stream: int | None = None) -> dict[str, Array]:
        """See ``runtime.engines.Engine.run``.

        Raises:
            EngineError: an answer of another type or shape than the manifest's.
        """
        answers = self._engine.run(feeds, stream=stream)
        sizes: dict[str, int] = {}
        for tensor, spec in self._graph.inputs.items():
            given = _shape(feeds[tensor])
            sizes |= {str(axis): n for axis, n in zip(spec.shape, given, strict=True)}
        for tensor, spec in self._graph.outputs.items():
            answer = answers[tensor]
            wanted = [a if isinstance(a, int) else sizes.get(a, a) for a in spec.shape]
            if not _agree(_shape(answer), wanted) or (
                hasattr(answer, "dtype") and answer.dtype != spec.dtype
            ):
                raise self._other(f"it answered '{tensor}' as {_shape(answer)}")
        return answers

    def close(self) -> None:
        self._engine.close()

    def _other(self, what: str) -> EngineError:
        return EngineError(
            f"graph '{self._name}' is not the one that the manifest describes: {what}",
            fix="export the bundle again",
        )


def _agree(one: Sequence[int | str], other: Sequence[int | str]) -> bool:
    return len(one) == len(other) and all(
        a == b or isinstance(a, str) or isinstance(b, str) for a, b in zip(one, other, strict=True)
    )


def _shape(array: object) -> tuple[int, ...]:
    if hasattr(array, "shape"):
        return tuple(array.shape)
    return tuple(array.__cuda_array_interface__["shape"])  # type: ignore[attr-defined]
