"""One bank per layer: how far is a patch from a normal one, by the cosine in each layer?

The features of a patch are those of several layers side by side, each of length 1, and a row of the
bank is the features of a normal patch. The score of a patch x is

    s = mean_l (1 - max_m <x_l, m_l>)

over layers l and rows m: each layer has a nearest row of its own. A *window* of radius r leaves
the rows whose patch stood at most r rows and r columns of the grid away from x: what is normal
elsewhere is none here. It needs as many rows for each place, in the order of the places.

Source: RAD ("Is Training Necessary for Anomaly Detection?", arXiv 2601.22763, 2026), with all
images of the bank as the neighbours of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Annotated

import numpy as np
from pydantic import Field

from engineworks.runtime.bank import Bank
from engineworks.runtime.coreset import greedy_k_centre
from engineworks.runtime.errors import BundleError, InputError
from engineworks.runtime.search import FastSearch
from engineworks.runtime.systems.noising.signals import Part
from engineworks.runtime.tensors import Array


class Layers(Part):
    """What a row of the bank is made of, and what of it is searched.

    Attributes:
        widths: of the layers, side by side.
        window: r, in patches; None: no window.
    """

    widths: tuple[Annotated[int, Field(ge=1, le=1 << 16)], ...] = Field(min_length=1, max_length=64)
    window: int | None = Field(default=None, ge=0, le=4096)


def slices(widths: Sequence[int]) -> list[slice]:
    """The columns of each layer in a row of all of them."""
    return [slice(*ends) for ends in pairwise(accumulate(widths, initial=0))]


def layer_scores(features_ND: Array, rows_MD: Array, widths: Sequence[int]) -> Array:
    """The score of each patch against all rows: (N,) float32 in [0, 2].

    Args:
        features_ND, rows_MD: float32; each layer of each row has length 1.
        widths: of the layers; their sum is D.
    """
    similar = [(features_ND[:, part] @ rows_MD[:, part].T).max(axis=1) for part in slices(widths)]
    return np.asarray(1 - np.mean(similar, axis=0), np.float32)


def window_scores(
    features_ND: Array,
    rows_MD: Array,
    widths: Sequence[int],
    *,
    grid: tuple[int, int],
    window: int,
) -> Array:
    """The score of each patch against the rows of places nearby: (N,) float32 in [0, 2].

    Args:
        features_ND: float32, N = h w patches, row by row.
        rows_MD: float32, M = N m: m rows for each place, in the order of the patches.
        grid: (h, w).
        window: r.
    """
    return _window_scores(features_ND, split(rows_MD, widths), grid, window)


def split(rows_MD: Array, widths: Sequence[int]) -> list[Array]:
    """Each layer's rows (M, D_l) by themselves."""
    return [np.ascontiguousarray(rows_MD[:, part]) for part in slices(widths)]


def _window_scores(
    features_ND: Array, layers: Sequence[Array], grid: tuple[int, int], window: int
) -> Array:
    h, w = grid
    columns = np.arange(w)
    is_near_WW = np.abs(columns[:, None] - columns) <= window
    parts = slices([rows_MD.shape[1] for rows_MD in layers])
    similar_hw = np.zeros(grid, np.float32)
    for rows_MD, part in zip(layers, parts, strict=True):
        row_hXD = rows_MD.reshape(h, -1, rows_MD.shape[1])  # X = w m: a row of the grid
        queries_hwD = features_ND[:, part].reshape(h, w, -1)
        for i in range(h):
            band_XD = row_hXD[max(0, i - window) : i + window + 1].reshape(-1, rows_MD.shape[1])
            similar_WRWm = (queries_hwD[i] @ band_XD.T).reshape(w, -1, w, row_hXD.shape[1] // w)
            nearest_WW = similar_WRWm.max(axis=(1, 3))
            similar_hw[i] += nearest_WW.max(axis=1, where=is_near_WW, initial=-1)
    return np.asarray(1 - similar_hw.ravel() / len(layers))


def window_rows(
    features_IND: Array, images: Array, max_rows: int, rng: np.random.Generator
) -> tuple[Array, float]:
    """The rows of a bank with a window: (N m, D), the m of a place as different as they can be.

    And the largest distance of any patch to its place's nearest row.

    Args:
        features_IND: (I, N, D) of normal images; may be memory-mapped.
        images: sorted indices of those to take.
        max_rows: at least N.
        rng: chooses the first row of each place.

    Raises:
        InputError: not a row for each place.
    """
    num_patches = features_IND.shape[1]
    num = min(max_rows // num_patches, len(images))
    if num < 1:
        raise InputError(
            f"a window needs a row for each of {num_patches} places, and the bank has room for "
            f"{max_rows}",
            fix=f"set fit.max_rows and fit.coreset_ratio for at least {num_patches} rows",
        )
    places, radii = [], []
    for place in range(num_patches):
        rows_ID = np.ascontiguousarray(features_IND[images, place])
        picks = greedy_k_centre(rows_ID, num, first=int(rng.integers(len(rows_ID))))
        # copies of a row leave fewer; a row that is there twice changes no maximum
        places.append(rows_ID[np.resize(picks.indices, num)])
        radii.append(picks.radius)
    return np.concatenate(places), max(radii)


class LayerBank(Bank):
    """A bank whose search gives the score of each patch in the place of its distance."""

    def __init__(self, rows_MD: Array, layers: Layers, grid: tuple[int, int]) -> None:
        """Split the rows.

        Args:
            grid: (h, w) of the patches that are searched for, and of the window.

        Raises:
            BundleError: rows of another width, or not as many for each place.
        """
        super().__init__(rows_MD)
        if self.width != sum(layers.widths):
            raise BundleError(
                f"the bank's rows are {self.width} wide, its layers {list(layers.widths)}",
                fix="export the bundle again",
            )
        if layers.window is not None and len(self) % (grid[0] * grid[1]):
            raise BundleError(
                f"{len(self)} rows of a bank are not as many for each place of {grid}",
                fix="export the bundle again",
            )
        self.layers = layers
        self.grid = grid
        self.parts = split(self.rows_MD, layers.widths)

    def search(
        self, queries_ND: Array, k: int, *, threads: int | None = None
    ) -> tuple[Array, Array]:
        """Scores (N, 1) float32 in [0, 2]; and (N, 1) zeros: each layer has a row of its own."""
        queries_ND = self.check(queries_ND)
        if self.layers.window is not None:
            return _as_found(_window_scores(queries_ND, self.parts, self.grid, self.layers.window))
        return _as_found(layer_scores(queries_ND, self.rows_MD, self.layers.widths))


def _as_found(scores_N: Array) -> tuple[Array, Array]:
    return scores_N[:, None], np.zeros((len(scores_N), 1), np.int64)


class LayerSearch:
    """The same answers as a ``LayerBank``'s; without a window at the speed of INT8."""

    def __init__(self, bank: LayerBank, *, backend: str, threads: int | None = None) -> None:
        """Prepare the bank for one backend; see ``runtime.search.FastSearch``."""
        self.bank = bank
        self._searches: list[FastSearch] = []
        if bank.layers.window is None:
            self._searches = [
                FastSearch(Bank(rows_MD), 1, backend=backend, threads=threads)
                for rows_MD in bank.parts
            ]

    def search(self, queries_ND: Array) -> tuple[Array, Array]:
        """See ``LayerBank.search``."""
        if not self._searches:
            return self.bank.search(queries_ND, 1)
        parts = zip(self._searches, split(queries_ND, self.bank.layers.widths), strict=True)
        # of two vectors of length 1: |x - m|^2 = 2 (1 - <x, m>)
        halves = [np.square(layer.search(rows_ND)[0][:, 0]) / 2 for layer, rows_ND in parts]
        return _as_found(np.asarray(np.mean(halves, axis=0), np.float32))

    def close(self) -> None:
        for layer in self._searches:
            layer.close()
