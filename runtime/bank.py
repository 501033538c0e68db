"""The memory bank: rows of normal features and the exact search for the nearest of them.

FAISS' flat index is the reference for every other search of the project and the file format.
"""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from engineworks.runtime import files
from engineworks.runtime.coreset import Progress, greedy_k_centre
from engineworks.runtime.errors import BankError
from engineworks.runtime.tensors import Array
from engineworks.runtime.threads import available_threads, in_parts

_QUERY_BLOCK = 4096
# fewer are measured row by row: FAISS would repack the whole bank for its product, and the threads
# of a BLAS that spin after it take the cores from the engine
_FEW_QUERIES = 32
# candidates beyond the K that a GPU is asked for: its products are rounded to 10 bits of mantissa,
# and so are its rows where they are halved
_SPARE_ON_GPU = 32


def gpu_is_usable() -> bool:
    """Whether this FAISS searches on GPUs, and there is one."""
    return bool(faiss.get_num_gpus())


class Bank:
    """(M, D) float32 rows behind a FAISS flat L2 index.

    The index holds the rows relative to their mean, because its product form of the distance loses
    digits far from the origin; the file holds the rows themselves.

    Raises:
        BankError: no rows, or a value that is not finite.
    """

    def __init__(self, rows_MD: Array) -> None:
        rows = np.ascontiguousarray(rows_MD, np.float32)
        if rows.ndim != 2 or len(rows) == 0:
            raise BankError(f"a bank needs (M, D) rows, got shape {rows.shape}")
        if not np.isfinite(rows).all():
            raise BankError("the bank holds values that are not finite")
        self.rows_MD = rows
        self._mean = rows.mean(axis=0)
        self._index = _flat_index(rows - self._mean)
        self._few, self._spare = _FEW_QUERIES, 0
        self._threads: int | None = None  # as many as a search is told

    def __len__(self) -> int:
        return len(self.rows_MD)

    @property
    def width(self) -> int:
        return int(self.rows_MD.shape[1])

    def search(
        self, queries_ND: Array, k: int, *, threads: int | None = None
    ) -> tuple[Array, Array]:
        """The exact K nearest rows of each query.

        Args:
            queries_ND: (N, D) float32.
            k: how many; at most M are returned.
            threads: None takes all cores that this process may use.

        Returns:
            Distances (N, K) float32, Euclidean, ascending, each computed from the difference of
            the two vectors (the product form of the index loses digits near zero), and row indices
            (N, K) int64.

        Raises:
            BankError: queries of another width.
        """
        queries = self.check(queries_ND)
        k = min(k, len(self))
        nearest = self._of_few if len(queries) < self._few else self._of_many
        found = in_parts(
            lambda part: nearest(queries[part], k),
            len(queries),
            self._threads or threads or available_threads(),
        )
        distances, indices = (np.concatenate(each) for each in zip(*found, strict=True))
        return distances, indices

    def _of_few(self, queries: Array, k: int) -> tuple[Array, Array]:
        everything = np.broadcast_to(np.arange(len(self)), (len(queries), len(self)))
        squared = self.squared_distances(queries, everything)
        indices = np.argpartition(squared, k - 1, axis=1)[:, :k]
        return ascending(np.take_along_axis(squared, indices, axis=1), indices)

    def _of_many(self, queries: Array, k: int) -> tuple[Array, Array]:
        _bound_faiss()
        candidates = min(k + self._spare, len(self))
        found = [np.empty((0, candidates), np.int64)]
        for start in range(0, len(queries), _QUERY_BLOCK):
            block = queries[start : start + _QUERY_BLOCK] - self._mean
            found.append(self._index.search(block, candidates)[1])
        indices = np.concatenate(found)
        distances, indices = ascending(self.squared_distances(queries, indices), indices)
        return distances[:, :k], indices[:, :k]

    def on_gpu(self, *, half: bool = False) -> Bank:
        """The same bank, searched by FAISS' flat index on the first GPU.

        The GPU names K + 32 candidates, and their distances are measured as ever. So a row can only
        be missed where more than 32 others are as near as the rounding of the GPU's products: 1e-3
        of |x| |m|, both relative to the bank's mean. Never run on a GPU.

        Args:
            half: hold the rows there in float16: half the memory.

        Raises:
            BankError: this FAISS is one for CPUs, or there is no GPU.
        """
        if not gpu_is_usable():
            raise BankError(
                f"FAISS {faiss.__version__} sees no GPU", fix='pip install "engineworks[gpu]"'
            )
        twin = copy.copy(self)
        twin._index = _GpuIndex(self._index, half=half)
        twin._few, twin._spare, twin._threads = 0, _SPARE_ON_GPU, 1
        return twin

    def squared_distances(self, queries_ND: Array, indices_NC: Array) -> Array:
        """Squared Euclidean distances to chosen rows, straight from the differences.

        Args:
            queries_ND: (N, D) float32.
            indices_NC: (N, C) int64 rows of the bank.

        Returns:
            (N, C) float32.
        """
        queries = self.check(queries_ND)
        indices = np.ascontiguousarray(indices_NC, np.int64)
        squared = np.empty(indices.shape, np.float32)
        _bound_faiss()
        faiss.fvec_L2sqr_by_idx(  # type: ignore[attr-defined]  # not in FAISS' stubs
            faiss.swig_ptr(squared),
            faiss.swig_ptr(queries),
            faiss.swig_ptr(self.rows_MD),
            faiss.swig_ptr(indices),
            self.width,
            len(queries),
            indices.shape[1],
        )
        return squared

    def extended(
        self,
        features_ND: Array,
        max_new: int,
        *,
        min_radius: float = 0.0,
        progress: Progress | None = None,
    ) -> Bank:
        """A bank with more rows: those new features that lie farthest from it.

        Args:
            features_ND: (N, D) float32 features of new normal images.
            max_new: at most so many rows are added.
            min_radius: features nearer than this to the bank are taken as known already.
        """
        picks = greedy_k_centre(
            self.check(features_ND),
            max_new,
            centres_MD=self.rows_MD,
            min_radius=min_radius,
            progress=progress,
        )
        return Bank(np.concatenate([self.rows_MD, features_ND[picks.indices]]))

    def save(self, path: Path) -> None:
        """Write a FAISS index file, atomically."""
        files.write(path, faiss.serialize_index(_flat_index(self.rows_MD)).tobytes())

    @staticmethod
    def load(path: Path) -> Bank:
        """Read a FAISS flat L2 index file.

        Raises:
            BankError: missing, corrupt, or an index of another kind.
        """
        if not path.is_file():
            raise BankError(f"there is no bank at {path}")
        return Bank.decode(path.read_bytes(), str(path))

    @staticmethod
    def decode(data: bytes, name: str) -> Bank:
        """As ``load``, of the content of such a file.

        Args:
            name: what errors call it.
        """
        try:
            index = faiss.deserialize_index(np.frombuffer(data, np.uint8))
        except (RuntimeError, ValueError, MemoryError) as error:
            raise BankError(
                f"{name} is not a FAISS index ({error})", fix="export the bundle again"
            ) from error
        if not isinstance(index, faiss.IndexFlat) or index.metric_type != faiss.METRIC_L2:
            raise BankError(f"{name} holds a {type(index).__name__}, not a flat L2 index")
        return Bank(index.reconstruct_n(0, index.ntotal))

    def check(self, queries_ND: Array) -> Array:
        """The queries as the search takes them: (N, D) float32, contiguous.

        Raises:
            BankError: another rank or width.
        """
        if queries_ND.ndim != 2 or queries_ND.shape[1] != self.width:
            raise BankError(
                f"queries have shape {queries_ND.shape}, the bank's rows have width {self.width}",
                fix="use the bank with the graph that it was built with",
            )
        return np.ascontiguousarray(queries_ND, np.float32)


def _bound_faiss() -> None:
    """Keep FAISS, and the BLAS in it, from starting threads for the one that calls it now.

    OpenMP counts them for each calling thread anew: many callers would have as many teams.
    """
    faiss.omp_set_num_threads(1)


def _flat_index(rows_MD: Array) -> Any:
    index = faiss.IndexFlatL2(rows_MD.shape[1])
    index.add(rows_MD)
    return index


class _GpuIndex:
    """A flat index on the first GPU, for one thread at a time: FAISS' scratch memory is shared.

    Source: FAISS' wiki, "Faiss on the GPU".
    """

    def __init__(self, index: Any, *, half: bool) -> None:
        self._resources = faiss.StandardGpuResources()
        options = faiss.GpuClonerOptions()
        options.useFloat16 = half
        self._index = faiss.index_cpu_to_gpu(self._resources, 0, index, options)
        self._lock = threading.Lock()

    def search(self, queries_ND: Array, k: int) -> Any:
        with self._lock:
            return self._index.search(queries_ND, k)


def ascending(squared_NK: Array, indices_NK: Array) -> tuple[Array, Array]:
    """Distances from squared ones, nearest first, with their rows."""
    order = np.argsort(squared_NK, axis=1, kind="stable")
    distances = np.sqrt(np.take_along_axis(squared_NK, order, axis=1))
    return distances, np.take_along_axis(indices_NK, order, axis=1)
