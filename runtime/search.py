"""Exact nearest rows of a memory bank at the speed of INT8.

A product of all queries with all rows in float32 costs more than an INT8 network. Here an INT8
product, run by the same backend as the network, only *bounds* each row's similarity from above; the
rows are sorted into blocks of similar ones, the blocks with the highest bounds are measured exactly
by FAISS, and every further block that might still hold a part of the answer is measured as well. So
the result is that of the flat search, and only the cost depends on the data.

For a query x and a row m, both relative to the bank's mean, the similarity

    s = x·m - |m|²/2        (|x - m|² = |x|² - 2 s)

is computed from x̂ = (round(x / a / q + u) - u) q and m̂ = floor(m a / w + v) w, where the equaliser
a (one factor per dimension) moves large values from the queries to the rows (Xiao et al.,
"SmoothQuant", 2023). The random u in [-1/2, 1/2) and v in [0, 1), fixed once, keep the rounding
errors of different dimensions independent even where their values are alike (Schuchman, "Dither
signals and their effect on quantization noise", 1964): that of x̂ is uniform in half a step, that of
m̂ twice as large in variance. So the error of a product of D terms has the standard deviation
sqrt(q² |m a|² + 2 w² |x / a|²) / sqrt(12), and ``_SIGMAS`` of it bound the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from engineworks.runtime import overflow
from engineworks.runtime.bank import Bank, gpu_is_usable
from engineworks.runtime.engines import BACKENDS, Engine, open_engine, products_overflow
from engineworks.runtime.tensors import Array
from engineworks.runtime.threads import available_threads, in_parts

_BLOCK = 8  # rows that share one bound
_GROUP = 8  # blocks whose highest bound is looked at first
_SPARE_BLOCKS = 2  # measured beyond one block per neighbour
_SIGMAS = 6.0
_PADDING = -1e30  # similarity of rows that only fill up the last block
_SCORES_BYTES = 32 << 20  # size of one product, so that it stays in the cache
_WORTHWHILE_BLOCKS = 16  # times the blocks measured: below, the flat search is as fast


class FastSearch:
    """K nearest rows, equal to ``Bank.search``.

    Attributes:
        searched: queries answered so far.
        repeated: those of them that had to be measured again.
    """

    def __init__(self, bank: Bank, k: int, *, backend: str, threads: int | None = None) -> None:
        """Prepare the bank for one backend.

        Args:
            bank: rows; not copied in float.
            k: neighbours per query; at most the bank's rows are returned.
            backend: ``openvino`` or ``ort``: runs the INT8 product. With a backend on the GPU it
                is FAISS' flat search: on the GPU too where this FAISS can, else on the CPU.
            threads: None takes all cores that this process may use.
        """
        on_gpu = BACKENDS[backend].needs_gpu
        self.bank = bank.on_gpu() if on_gpu and gpu_is_usable() else bank
        self.k = min(k, len(bank))
        self.searched = self.repeated = 0
        self._threads = threads or available_threads()
        self._blocks = self.k + _SPARE_BLOCKS
        self._engine: Engine | None = None
        worthwhile = len(bank) >= _BLOCK * _WORTHWHILE_BLOCKS * self._blocks
        if worthwhile and not on_gpu:
            self._prepare(backend)

    def _prepare(self, backend: str) -> None:
        bank = self.bank
        mean = bank.rows_MD.mean(axis=0)
        centred = bank.rows_MD - mean
        norms_M = np.einsum("md,md->m", centred, centred)
        largest_D = np.abs(centred).max(axis=0)
        equaliser = np.sqrt(np.maximum(largest_D, largest_D.max() * 1e-6) + 1e-30)
        rows = centred * equaliser
        query_step = np.float32((largest_D / equaliser).max() / 127)
        levels = overflow.LIMIT if products_overflow(backend) else 127
        row_steps = np.maximum(np.abs(rows).max(axis=1) / levels, 1e-12).astype(np.float32)
        rng = np.random.default_rng(0)
        dither = query_step * rng.uniform(-0.5, 0.5, bank.width).astype(np.float32)
        whole = np.floor(rows / row_steps[:, None] + rng.random(rows.shape, np.float32))
        whole = np.minimum(whole, levels)

        # a query up to this length has its error inside the bounds; a longer one adds to them, so
        # the few longest rows need not widen the bounds of all queries
        self._length = float(np.quantile(np.linalg.norm(centred / equaliser, axis=1), 0.98))
        self._excess = _SIGMAS * float(row_steps.max()) / np.sqrt(6)
        row_part = 2 * np.square(row_steps * self._length)
        query_part = np.square(query_step) * np.square(rows).sum(axis=1)
        margin = _SIGMAS * np.sqrt((row_part + query_part) / 12)
        self._reach = 127.5 * float(query_step)  # a larger value saturates: no bound holds

        order = _similar_rows_together(rows, _BLOCK)
        num_blocks = -(-len(bank) // (_BLOCK * _GROUP)) * _GROUP
        padded = np.full(num_blocks * _BLOCK, -1, np.int64)
        padded[: len(bank)] = order
        # the members of block b are columns b, b + num_blocks, ...: the maximum over a block then
        # runs over whole vectors
        members = padded.reshape(num_blocks, _BLOCK)
        columns = members.T.ravel()
        filled = columns >= 0
        weights = np.zeros((len(columns), bank.width), np.int8)
        weights[filled] = whole.astype(np.int8)[columns[filled]]
        steps = np.ones(len(columns), np.float32)
        steps[filled] = row_steps[columns[filled]]
        bias = np.full(len(columns), _PADDING, np.float32)
        bias[filled] = (margin - norms_M / 2 - row_steps * (whole @ dither))[columns[filled]]
        # whole blocks of padding are never among the best; one block may be partly padding
        self._members = np.maximum(members, 0)
        short = np.flatnonzero((members[:, 0] >= 0) & (members[:, -1] < 0))
        self._short = int(short[0]) if len(short) else -1
        self._surplus = np.where(members[self._short] < 0, np.float32(np.inf), np.float32(0))
        self._tile = max(64, _SCORES_BYTES // (4 * len(columns)))
        constants = {
            "mean": mean,
            "inverse": (1.0 / equaliser).astype(np.float32),
            "weights": np.ascontiguousarray(weights.T),
            "steps": steps,
            "bias": bias,
            "query_step": query_step,
            "dither": dither,
        }
        self._engine = open_engine(
            _bounds_graph(constants, integer=backend == "ort"),
            backend,
            precision="int8",
            threads=self._threads,
        )

    def search(self, queries_ND: Array) -> tuple[Array, Array]:
        """The K nearest rows of each query.

        Args:
            queries_ND: (N, D) float32.

        Returns:
            Distances (N, K) float32, ascending, and row indices (N, K) int64, as ``Bank.search``.
        """
        queries_ND = self.bank.check(queries_ND)
        self.searched += len(queries_ND)
        if self._engine is None:
            return self.bank.search(queries_ND, self.k, threads=self._threads)
        found = [
            self._search_tile(queries_ND[i : i + self._tile])
            for i in range(0, len(queries_ND), self._tile)
        ]
        if len(found) == 1:
            return found[0]
        return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])

    def _search_tile(self, queries: Array) -> tuple[Array, Array]:
        assert self._engine is not None
        bounded = self._engine.run({"queries": queries})
        distances = np.empty((len(queries), self.k), np.float32)
        indices = np.empty((len(queries), self.k), np.int64)
        saturated = bounded["largest"] > self._reach

        def answer(part: slice) -> int:
            here = {name: values[part] for name, values in bounded.items()}
            distances[part], indices[part], repeated = self._search_bounded(
                queries[part], here, ~saturated[part]
            )
            return repeated

        self.repeated += sum(in_parts(answer, len(queries), self._threads))
        if saturated.any():
            distances[saturated], indices[saturated] = self.bank.search(
                queries[saturated], self.k, threads=self._threads
            )
            self.repeated += int(saturated.sum())
        return distances, indices

    def _search_bounded(
        self, queries: Array, bounded: Mapping[str, Array], holds_N: Array
    ) -> tuple[Array, Array, int]:
        """Distances and indices (N, K), and how many queries had to be measured again.

        Args:
            bounded: what the engine says of them.
            holds_N: bool: whose bounds hold; the others' answers mean nothing.
        """
        # a query longer than usual adds to its errors
        excess_N = self._excess * np.maximum(bounded["lengths"] - self._length, 0)
        blocks, outside_N = self._best_blocks(bounded["block_bounds"], bounded["group_bounds"])
        distances, indices = self._measure(queries, blocks)
        similarity_N = (np.square(bounded["norms"]) - np.square(distances[:, -1])) / 2
        unsure = np.flatnonzero((similarity_N < outside_N + excess_N) & holds_N)
        if len(unsure):
            bounds = bounded["block_bounds"][unsure] + excess_N[unsure, None]
            possible = (bounds >= similarity_N[unsure, None]).sum(axis=1)
            blocks, _ = _highest(bounds, int(possible.max()))
            distances[unsure], indices[unsure] = self._measure(queries[unsure], blocks)
        return distances, indices, len(unsure)

    def _measure(self, queries: Array, blocks: Array) -> tuple[Array, Array]:
        """The K nearest rows in chosen blocks (N, n): distances and indices (N, K), ascending."""
        indices = self._members[blocks].reshape(len(queries), -1)
        squared = self.bank.squared_distances(queries, indices)
        rows, places = np.nonzero(blocks == self._short)
        squared.reshape(len(queries), -1, _BLOCK)[rows, places] += self._surplus
        return _nearest(squared, indices, self.k)

    def _best_blocks(self, block_bounds: Array, group_bounds: Array) -> tuple[Array, Array]:
        """Blocks with the highest bounds, and the highest bound of all others.

        The best n blocks lie in the n groups with the best blocks, so groups are chosen first.

        Args:
            block_bounds: (N, blocks) float32.
            group_bounds: (N, groups) float32: block b is in group b % groups.

        Returns:
            (N, n) int64 in no order, and (N,) float32.
        """
        count, num_blocks = block_bounds.shape
        num_groups = group_bounds.shape[1]
        groups, _ = _highest(group_bounds, min(self._blocks + 1, num_groups))
        candidates = (groups[:, :, None] + num_groups * np.arange(_GROUP)).reshape(count, -1)
        flat = candidates + num_blocks * np.arange(count)[:, None]
        places, outside_N = _highest(np.take(block_bounds, flat), self._blocks)
        return np.take_along_axis(candidates, places, axis=1), outside_N

    def close(self) -> None:
        """Release the engine of the INT8 product."""
        if self._engine is not None:
            self._engine.close()


def _highest(values_NC: Array, num: int) -> tuple[Array, Array]:
    """The largest values of each row.

    NumPy partitions values with vector instructions but their indices without: so the border is
    found first, and what lies above it by comparison.

    Returns:
        Places (N, num) int64 in no order, and the largest of the other values (N,); -inf where
        there are none.
    """
    count, width = values_NC.shape
    if num == width:
        return np.tile(np.arange(width), (count, 1)), np.full(count, -np.inf, values_NC.dtype)
    border_N = np.partition(values_NC, width - num - 1, axis=1)[:, width - num - 1]
    above = np.flatnonzero(values_NC > border_N[:, None])
    if len(above) == num * count:
        return (above % width).reshape(count, num), border_N
    # values on the border are equal to others above it
    return np.argpartition(values_NC, width - num, axis=1)[:, width - num :], border_N


def _nearest(squared_NC: Array, indices_NC: Array, k: int) -> tuple[Array, Array]:
    """Distances (N, K) float32, ascending, and their rows (N, K) int64; lower rows first if equal.

    The bits of a float that is not negative order like an integer: one sort of (distance, row)
    pairs packed into 64 bits needs no gathering afterwards.
    """
    keys = (squared_NC.view(np.int32).astype(np.int64) << 32) | indices_NC
    keys = np.sort(keys, axis=1)[:, :k]
    squared = (keys >> 32).astype(np.int32).view(np.float32)
    return np.sqrt(squared), keys & 0xFFFFFFFF


def _similar_rows_together(rows_MD: Array, block: int) -> Array:
    """An order of the rows in which runs of ``block`` are alike.

    Halves along the direction of the largest spread, again and again; halves are whole blocks.

    Returns:
        (M,) int64 permutation.
    """
    start = np.random.default_rng(0).standard_normal(rows_MD.shape[1]).astype(np.float32)
    rows_MD = rows_MD / max(float(np.abs(rows_MD).max()), 1e-30)  # squares would overflow
    leaves: list[Array] = []
    pending = [np.arange(len(rows_MD))]
    while pending:
        ids = pending.pop()
        if len(ids) <= block:
            leaves.append(ids)
            continue
        part = rows_MD[ids] - rows_MD[ids].mean(axis=0)
        direction = start
        # some kernels of OpenBLAS leave the flag of an invalid operation, of finite rows too, by
        # what stood in registers (numpy issue 24067): no warning is meant
        with np.errstate(invalid="ignore"):
            for _ in range(8):  # power iteration
                direction = part.T @ (part @ direction)
                direction = direction / (np.linalg.norm(direction) + 1e-30)
            along = part @ direction
        ids = ids[np.argsort(along, kind="stable")]
        half = max(1, round(len(ids) / block / 2)) * block
        pending += [ids[half:], ids[:half]]
    return np.concatenate(sorted(leaves, key=lambda leaf: len(leaf) < block))


def _bounds_graph(constants: Mapping[str, Array], *, integer: bool) -> bytes:
    """ONNX: queries -> ``block_bounds`` (N, blocks) and ``group_bounds`` (N, groups) of the blocks.

    Further outputs per query x, relative to the bank's mean: ``norms`` |x|, ``lengths`` |x / a| and
    ``largest`` max |x / a|. The first rows of all blocks have a product of their own, the second
    rows too, and so on: each is still in the cache when the maximum is taken.

    Args:
        constants: ``mean``, ``inverse`` (1 / a), ``weights`` (D, columns) int8 with scales
            ``steps``, ``bias`` (columns,), and ``query_step``, the scale of the queries.
        integer: write MatMulInteger on unsigned queries, ONNX Runtime's fast form; otherwise Q/DQ
            convolutions, which take OpenVINO half the time of products.
    """
    width, num_columns = constants["weights"].shape
    num_blocks = num_columns // _BLOCK
    num_groups = num_blocks // _GROUP
    used = {name: constants[name] for name in ("mean", "inverse", "dither", "query_step")} | {
        "axis": np.array([1], np.int64),
        "groups": np.full(_GROUP, num_groups, np.int64),
    }
    nodes = [
        helper.make_node("Sub", ["queries", "mean"], ["centred"]),
        helper.make_node("Mul", ["centred", "inverse"], ["scaled"]),
        helper.make_node("ReduceL2", ["centred", "axis"], ["norms"], keepdims=0),
        helper.make_node("ReduceL2", ["scaled", "axis"], ["lengths"], keepdims=0),
        helper.make_node("Add", ["scaled", "dither"], ["dithered"]),
        helper.make_node("Abs", ["dithered"], ["magnitudes"]),
        helper.make_node("ReduceMax", ["magnitudes", "axis"], ["largest"], keepdims=0),
    ]
    nodes += (_products if integer else _convolutions)(constants, num_blocks, used)
    nodes += _running_maximum([f"upper{i}" for i in range(_BLOCK)], "highest")
    if not integer:
        nodes.append(helper.make_node("Transpose", ["highest"], ["by_query"], perm=[0, 2, 3, 1]))
    used["by_block"] = np.array([-1, num_blocks], np.int64)
    last = "highest" if integer else "by_query"
    nodes.append(helper.make_node("Reshape", [last, "by_block"], ["block_bounds"]))
    parts = [f"blocks{i}" for i in range(_GROUP)]
    nodes.append(helper.make_node("Split", ["block_bounds", "groups"], parts, axis=1))
    nodes += _running_maximum(parts, "group_bounds")
    outputs = [
        ("block_bounds", TensorProto.FLOAT, ["queries", num_blocks]),
        ("group_bounds", TensorProto.FLOAT, ["queries", num_groups]),
        ("norms", TensorProto.FLOAT, ["queries"]),
        ("lengths", TensorProto.FLOAT, ["queries"]),
        ("largest", TensorProto.FLOAT, ["queries"]),
    ]
    graph = helper.make_graph(
        nodes,
        "bounds",
        [helper.make_tensor_value_info("queries", TensorProto.FLOAT, ["queries", width])],
        [helper.make_tensor_value_info(*output) for output in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in used.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def _products(
    constants: Mapping[str, Array], num_blocks: int, used: dict[str, Array]
) -> list[NodeProto]:
    """``dithered`` (N, D) -> ``upper0``, ... (N, blocks): products of integers.

    Args:
        used: what the nodes need is added.
    """
    used["query_zero"], used["zero"] = np.array(128, np.uint8), np.array(0, np.int8)
    nodes = [helper.make_node("QuantizeLinear", ["dithered", "query_step", "query_zero"], ["q"])]
    for i in range(_BLOCK):
        part = slice(i * num_blocks, (i + 1) * num_blocks)
        used[f"weights{i}"] = np.ascontiguousarray(constants["weights"][:, part])
        used[f"scales{i}"] = constants["steps"][part] * constants["query_step"]
        used[f"bias{i}"] = constants["bias"][part]
        operands = ["q", f"weights{i}", "query_zero", "zero"]
        nodes += [
            helper.make_node("MatMulInteger", operands, [f"whole{i}"]),
            helper.make_node("Cast", [f"whole{i}"], [f"real{i}"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"real{i}", f"scales{i}"], [f"product{i}"]),
            helper.make_node("Add", [f"product{i}", f"bias{i}"], [f"upper{i}"]),
        ]
    return nodes


def _convolutions(
    constants: Mapping[str, Array], num_blocks: int, used: dict[str, Array]
) -> list[NodeProto]:
    """``dithered`` (N, D) -> ``upper0``, ... (1, blocks, N, 1): queries are the pixels of a column.

    Args:
        used: what the nodes need is added.
    """
    # (1, N, 1, D) to (1, D, N, 1) is a change of layout, which OpenVINO does with its fast reorder
    used["query_zero"], used["outer"] = np.array(0, np.int8), np.array([0, 2], np.int64)
    nodes = [
        helper.make_node("Unsqueeze", ["dithered", "outer"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["pixels"], perm=[0, 3, 1, 2]),
        helper.make_node("QuantizeLinear", ["pixels", "query_step", "query_zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "query_step", "query_zero"], ["dq"]),
    ]
    for i in range(_BLOCK):
        part = slice(i * num_blocks, (i + 1) * num_blocks)
        weights = np.ascontiguousarray(constants["weights"][:, part].T)
        used[f"weights{i}"] = weights[:, :, None, None]
        used[f"steps{i}"] = constants["steps"][part]
        used[f"zeros{i}"] = np.zeros(num_blocks, np.int8)
        used[f"bias{i}"] = constants["bias"][part]
        operands = [f"weights{i}", f"steps{i}", f"zeros{i}"]
        nodes += [
            helper.make_node("DequantizeLinear", operands, [f"filters{i}"], axis=0),
            helper.make_node("Conv", ["dq", f"filters{i}", f"bias{i}"], [f"upper{i}"]),
        ]
    return nodes


def _running_maximum(names: Sequence[str], out: str) -> list[NodeProto]:
    """Element-wise maximum that takes in each value as soon as it is there."""
    partial = [names[0], *(f"{out}_{i}" for i in range(1, len(names) - 1)), out]
    return [
        helper.make_node("Max", [partial[i], name], [partial[i + 1]])
        for i, name in enumerate(names[1:])
    ]
