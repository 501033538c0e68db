"""Recipes: what of a run becomes which graph of a bundle, and what INT8 must leave alone.

Recipes are read by ``trace`` alone. What ``build`` needs of them later, where there may be no
torch, travels in the manifest.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from engineworks.export.quantize import NOTHING, KeepFloat
from engineworks.runtime.bundle import Threshold
from engineworks.runtime.errors import UsageError
from engineworks.runtime.preprocess import PlanesSpec, PreprocessSpec

# name -> module with a ``RECIPE``
RECIPES: dict[str, str] = {
    "backbone": "engineworks.export.systems.backbone",
    "noising": "engineworks.export.systems.noising",
    "paco": "engineworks.export.systems.paco",
    "refdet": "engineworks.export.systems.refdet",
    "stripe": "engineworks.export.systems.stripe",
}

# What adds up over many layers, the residual stream, stays float. Attention's products, norms,
# softmax and rotary embeddings have no constant weights: the quantizer leaves them alone.
TRANSFORMER = KeepFloat(op_types=frozenset({"Add"}))


@dataclass(frozen=True)
class Source:
    """One graph before it is traced.

    Attributes:
        module: a torch module in eval mode on the CPU.
        inputs: names of ``forward``'s arguments in the graph.
        outputs: names of what it returns.
        examples: tuples of argument tensors; the first is traced, all are compared. A free axis
            is larger than 1 in the first.
        free: input name -> axis -> name of that axis, for axes that are not fixed.
        shapes: output name -> its promised shape, with names for free axes; of the outputs that the
            rest of the system knows by their layout and width.
        before_choice: takes ``forward``'s arguments and gives, in the order of ``outputs``, what is
            left of them by ``export.passes.before_choice``, for a module that chooses candidates:
            where two are nearly equal, two libraries may choose differently, and both be right.
        keep_float: what INT8 leaves alone in this graph, where the recipe's rule is not for it.
        tolerance: of this graph, where the recipe's is not for it.
    """

    module: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    examples: tuple[tuple[Any, ...], ...]
    free: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    before_choice: Callable[..., Any] | None = None
    keep_float: KeepFloat | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Contents:
    """What a bundle holds beside its graphs; see ``runtime.bundle.Manifest``.

    Attributes:
        assets: role -> file of the run, copied under its own name.
    """

    preprocess: PreprocessSpec | PlanesSpec
    params: Mapping[str, Any]
    thresholds: Mapping[str, Threshold]
    assets: Mapping[str, Path]
    labels: tuple[str, ...] = ()


class Prepare(Protocol):
    """Leaves in a folder what a run would hold; gives where it comes from, for the record."""

    def __call__(
        self, folder: Path, *, name: str, options: Mapping[str, str]
    ) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Recipe:
    """How a system is exported.

    Attributes:
        graphs: run folder (or what was prepared) -> graph name -> source.
        contents: the same folder -> the rest of the bundle.
        gate: metric -> by how much INT8 may be worse than float.
        keep_float: what INT8 leaves alone in every graph.
        tolerance: largest relative error of ONNX against torch, both in float32.
        prepare: of a system that is exported by NAME and has no run.
    """

    graphs: Callable[[Path], Mapping[str, Source]]
    contents: Callable[[Path], Contents]
    gate: Mapping[str, float]
    keep_float: KeepFloat = NOTHING
    tolerance: float = 1e-4
    prepare: Prepare | None = None


def recipe(system: str) -> Recipe:
    """The recipe of a system.

    Raises:
        UsageError: there is no such system.
    """
    if system not in RECIPES:
        raise UsageError(
            f"there is no system '{system}'", fix=f"choose one of {', '.join(RECIPES)}"
        )
    found: Recipe = importlib.import_module(RECIPES[system]).RECIPE
    return found
