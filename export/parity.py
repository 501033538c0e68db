"""Parity: do two engines answer the same to the same feeds? Torch-free.

The feeds are those of the deployed system: ``record`` listens to it.

The relative error of an output is |got - want|_max / |want|_max: errors of a tensor are measured
against its largest value, because that is what the next layer adds them to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing

import numpy as np
import onnx
from pydantic import BaseModel, ConfigDict

from engineworks.export.passes import before_choice
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.engines import Engine, open_engine
from engineworks.runtime.errors import ParityError
from engineworks.runtime.systems import exercise, open_engines, open_system, variant_of
from engineworks.runtime.tensors import Array, TensorSpec
from engineworks.runtime.tensors import Feeds as EngineFeeds

Feeds = Mapping[str, Sequence[Mapping[str, Array]]]  # graph -> what it is fed, call by call


class Parity(BaseModel):
    """How far one output is from what it should be.

    Attributes:
        max_rel: |got - want|_max / |want|_max.
        mean_rel: mean |got - want| / mean |want|.
        cosine: mean cosine between the rows of both: along the last axis, or along the channels of
            feature maps (B, C, h, w) that have several.
        cosine_worst1pct: mean cosine of the worst 1 % of the rows, at least one; the tail decides
            where a mean looks well.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    max_rel: float
    mean_rel: float
    cosine: float
    cosine_worst1pct: float


def compare(got: Mapping[str, Array], want: Mapping[str, Array]) -> dict[str, Parity]:
    """Measure every output of ``want``.

    Args:
        got, want: output name -> array; equal shapes.

    Raises:
        ParityError: an output is missing, of another shape, or not finite.
    """
    return {name: _compare(name, got.get(name), wanted) for name, wanted in want.items()}


def check(
    got: Mapping[str, Array], want: Mapping[str, Array], *, tolerance: float
) -> dict[str, Parity]:
    """``compare``, and refuse what is farther off than ``tolerance``.

    Args:
        tolerance: largest ``max_rel`` of any output.

    Raises:
        ParityError: see ``compare``; or beyond the tolerance: every output at fault is named.
    """
    parities = compare(got, want)
    faults = [f"'{n}' by {p.max_rel:.2e}" for n, p in parities.items() if p.max_rel > tolerance]
    if faults:
        raise ParityError(
            f"outputs differ by more than {tolerance:.0e} of their largest value: "
            f"{', '.join(faults)}",
            fix="compare layer by layer; a lower precision needs a wider tolerance",
        )
    return parities


def check_shapes(
    outputs: Mapping[str, TensorSpec], promised: Mapping[str, tuple[int | str, ...]]
) -> None:
    """Refuse outputs of another layout or width than the system promises.

    Args:
        promised: output name -> shape, with names for free axes.

    Raises:
        ParityError: an output is missing or of another shape; every one at fault is named.
    """
    faults = [
        f"'{name}' is {outputs[name].shape if name in outputs else 'missing'}, not {shape}"
        for name, shape in promised.items()
        if name not in outputs or outputs[name].shape != shape
    ]
    if faults:
        raise ParityError(
            f"the graph's outputs are not what the system promises: {'; '.join(faults)}",
            fix="compare the net's maps with what the configuration says of them",
        )


def _compare(name: str, got: Array | None, want: Array) -> Parity:
    if got is None or got.shape != want.shape:
        raise ParityError(
            f"output '{name}' is {'missing' if got is None else f'of shape {got.shape}'}, "
            f"it should be of shape {want.shape}"
        )
    a, b = got.astype(np.float64), want.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ParityError(
            f"output '{name}' holds values that are not finite",
            fix="check the weights, and keep overflowing layers in float32",
        )
    error, size = np.abs(a - b), np.abs(b)
    tiny = float(np.finfo(np.float32).tiny)  # where all that is wanted is zero
    if a.ndim == 4 and a.shape[1] > 1:
        a, b = np.moveaxis(a, 1, -1), np.moveaxis(b, 1, -1)
    cosines = np.sort(_cosines(a, b))
    worst = max(1, len(cosines) // 100)
    return Parity(
        max_rel=float(error.max() / max(size.max(), tiny)),
        mean_rel=float(error.mean() / max(size.mean(), tiny)),
        cosine=float(cosines.mean()),
        cosine_worst1pct=float(cosines[:worst].mean()),
    )


def _cosines(a: Array, b: Array) -> Array:
    """Cosine of each pair of rows; two zero rows agree, a zero row and another do not."""
    width = a.shape[-1] if a.ndim else 1
    a, b = a.reshape(-1, width), b.reshape(-1, width)
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    product = norms[0] * norms[1]
    both_zero = (norms[0] == 0) & (norms[1] == 0)
    dots = np.einsum("nd,nd->n", a, b)
    return np.where(both_zero, 1.0, np.divide(dots, product, out=0 * dots, where=product > 0))


_RECORDED_BYTES = 1 << 28  # of one graph: the tiles of a few large pictures would fill memory


class _Recorder:
    """An engine that remembers what it was fed, up to a bound."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.backend = engine.backend
        self.inputs: Mapping[str, TensorSpec] = engine.inputs
        self.outputs: Mapping[str, TensorSpec] = engine.outputs
        self.feeds: list[dict[str, Array]] = []
        self._num_bytes = 0

    def run(self, feeds: EngineFeeds, *, stream: int | None = None) -> dict[str, Array]:
        size = sum(np.asarray(feed).nbytes for feed in feeds.values())
        if not self.feeds or self._num_bytes + size <= _RECORDED_BYTES:
            self._num_bytes += size
            self.feeds.append({name: np.array(feed) for name, feed in feeds.items()})
        return self._engine.run(feeds, stream=stream)

    def close(self) -> None:
        self._engine.close()


def record(bundle: Bundle, images: Sequence[Array], *, threads: int | None = None) -> Feeds:
    """What the deployed system feeds its graphs, one image at a time."""
    engines = open_engines(bundle, "ort", "float", threads=threads)
    recorders = {name: _Recorder(engine) for name, engine in engines.items()}
    with closing(
        open_system(bundle, backend="ort", precision="float", engines=recorders, threads=threads)
    ) as system:
        for image in images:
            exercise(system, [image])
    return {name: recorder.feeds for name, recorder in recorders.items()}


def outputs(engine: Engine, feeds: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Outputs over several feeds, joined along the batch."""
    answers = [engine.run(feed) for feed in feeds]
    return {name: np.concatenate([answer[name] for answer in answers]) for name in engine.outputs}


def answers(
    bundle: Bundle, backend: str, precision: str, feeds: Feeds, *, threads: int | None = None
) -> dict[str, dict[str, Array]]:
    """Per graph, what can be compared of its outputs; see ``passes.before_choice``."""
    found = {}
    for name, graph in bundle.manifest.graphs.items():
        variant = variant_of(graph.variants, backend, precision)
        assert variant is not None  # float is in every bundle, INT8 was just written
        model = before_choice(onnx.load(bundle.path(graph.variants[variant])))
        with closing(
            open_engine(model.SerializeToString(), backend, precision=precision, threads=threads)
        ) as engine:
            found[name] = outputs(engine, feeds[name])
    return found
