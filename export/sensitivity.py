"""What each quantized node costs: which ones are worth putting back to float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import onnx

from engineworks.export.parity import compare
from engineworks.export.quantize import NOTHING, KeepFloat, quantizable, quantize, to_unsigned
from engineworks.runtime.engines import open_engine
from engineworks.runtime.errors import QuantizationError
from engineworks.runtime.tensors import Array


@dataclass(frozen=True)
class OutputError:
    """How far one output is from the float graph's, over all feeds.

    Attributes:
        relative: L2 norm of the difference over the L2 norm of the float output.
        cosine: mean cosine between vectors along the channels (the last axis; axis 1 of a map).
        tail_cosine: mean cosine of the worst 1 % of these vectors, the ones that decide an anomaly.
    """

    relative: float
    cosine: float
    tail_cosine: float


@dataclass(frozen=True)
class NodeCost:
    """One node's part in the error.

    Attributes:
        node: its name.
        op_type: its ONNX operator.
        alone: graph output -> error when only this node is quantized.
        without: graph output -> error when all nodes but this one are.
    """

    node: str
    op_type: str
    alone: Mapping[str, OutputError]
    without: Mapping[str, OutputError]

    @property
    def worst(self) -> float:
        """The largest relative error that it causes alone in any output."""
        return max(error.relative for error in self.alone.values())


def sensitivity(
    model: onnx.ModelProto,
    ranges: Mapping[str, float],
    feeds: Sequence[Mapping[str, Array]],
    keep_float: KeepFloat = NOTHING,
    *,
    means: Mapping[str, Array] | None = None,
    threads: int | None = None,
) -> list[NodeCost]:
    """Quantize one node at a time, and all but one, and compare the outputs with the float graph's.

    Takes two graph loads and two runs per node and feed: a few feeds are enough.

    Args:
        model: the float graph.
        ranges: tensor -> amax.
        feeds: host arrays for the graph's inputs, at least one set.
        keep_float: nodes that stay float in any case.
        means: tensor -> channel means, as ``quantize`` takes them.
        threads: None takes all cores that this process may use.

    Returns:
        One cost per node that ``quantizable`` lists, worst first.

    Raises:
        QuantizationError: no feeds, or see ``quantize``.
        InputError, EngineError: a feed does not fit, or a graph cannot be run.
    """
    if not feeds:
        raise QuantizationError("there are no feeds to measure with", fix="give at least one image")
    names = quantizable(model, keep_float)
    op_types = {node.name: node.op_type for node in model.graph.node}
    want = _run(model, feeds, threads)

    def errors(quantized: set[str]) -> dict[str, OutputError]:
        rest = keep_float.plus(set(names) - quantized)
        got = _run(to_unsigned(quantize(model, ranges, rest, means=means)), feeds, threads)
        return {name: measure(want[name], got[name]) for name in want}

    costs = [
        NodeCost(name, op_types[name], errors({name}), errors(set(names) - {name}))
        for name in names
    ]
    return sorted(costs, key=lambda cost: cost.worst, reverse=True)


def measure(want: Sequence[Array], got: Sequence[Array]) -> OutputError:
    """Errors of one output.

    Args:
        want: per feed, float32 (B, C, H, W) or (B, ..., D).
        got: likewise.

    Raises:
        ParityError: unlike shapes, or a value that is not finite.
    """
    a, b = (np.concatenate(values).astype(np.float64) for values in (want, got))
    parity = compare({"output": b}, {"output": a})["output"]
    size = max(float(np.linalg.norm(a)), float(np.finfo(np.float32).tiny))
    return OutputError(
        relative=float(np.linalg.norm(a - b)) / size,
        cosine=parity.cosine,
        tail_cosine=parity.cosine_worst1pct,
    )


def _run(
    model: onnx.ModelProto, feeds: Sequence[Mapping[str, Array]], threads: int | None
) -> dict[str, list[Array]]:
    content = model.SerializeToString()
    with closing(open_engine(content, "ort", precision="int8", threads=threads)) as engine:
        results = [engine.run(feed) for feed in feeds]
        return {name: [result[name] for result in results] for name in engine.outputs}
