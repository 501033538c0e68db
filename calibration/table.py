"""The calibration table: ranges per tensor, and what they were measured with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engineworks.calibration.ranges import DEFAULT_PERCENTILE
from engineworks.calibration.samples import Sample
from engineworks.runtime import files
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.errors import CalibrationError
from engineworks.runtime.preprocess import PlanesSpec, PreprocessSpec
from engineworks.runtime.tensors import Array

_SHA256 = Field(pattern=r"^[0-9a-f]{64}$")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Range(_Part):
    """Of one tensor: what INT8 shall represent, and what was seen.

    Attributes:
        amax: the largest magnitude to represent.
        min, max: the true extremes.
        means: of each channel; none where they were not measured.
    """

    amax: float = Field(gt=0)
    min: float
    max: float
    means: tuple[float, ...] = ()


class GraphRanges(_Part):
    """Ranges of one graph, bound to the bytes of its float ONNX file."""

    sha256: str = _SHA256
    tensors: dict[str, Range]


class Table(_Part):
    """Ranges with their provenance.

    Attributes:
        method: one of ``calibration.ranges.METHODS``.
        percentile: of method ``percentile``, else None.
        graphs: graph name -> its ranges.
        samples: name -> SHA-256 of every image that was shown.
        preprocess: SHA-256 of the spec that prepared them.
        tools: name -> version of what measured.
    """

    format: Literal["engineworks-calibration"] = "engineworks-calibration"
    schema_version: Literal[1] = 1
    method: str
    percentile: float | None
    graphs: dict[str, GraphRanges]
    samples: dict[str, str]
    preprocess: str = _SHA256
    tools: dict[str, str]

    def amax(self, graph: str) -> dict[str, float]:
        """Tensor -> amax of one graph, as ``export.quantize.quantize`` takes it.

        Raises:
            CalibrationError: the table has no such graph.
        """
        return {name: found.amax for name, found in self._tensors(graph).items()}

    def means(self, graph: str) -> dict[str, Array]:
        """Tensor -> (C,) float64 channel means of one graph, likewise.

        Raises:
            CalibrationError: the table has no such graph.
        """
        return {name: np.array(r.means) for name, r in self._tensors(graph).items() if r.means}

    def _tensors(self, graph: str) -> dict[str, Range]:
        if graph not in self.graphs:
            raise CalibrationError(
                f"the calibration table has no graph '{graph}', only {sorted(self.graphs)}",
                fix="calibrate again",
            )
        return self.graphs[graph].tensors

    def check(
        self,
        bundle: Bundle,
        samples: Sequence[Sample],
        *,
        method: str,
        percentile: float = DEFAULT_PERCENTILE,
    ) -> None:
        """Refuse to be used for anything but what it was measured with.

        Args:
            bundle: what shall be quantized now.
            samples: what would be shown now.
            method: what would be used now.
            percentile: likewise; compared for method ``percentile`` only.

        Raises:
            CalibrationError: names all that differs.
        """
        stale = [
            f"graph '{name}' is another file"
            for name, ranges in self.graphs.items()
            if ranges.sha256 != graph_sha256(bundle, name)
        ]
        if self.preprocess != preprocess_sha256(bundle.manifest.preprocess):
            stale.append("the preprocess spec is another one")
        wanted = {sample.name: sample.sha256 for sample in samples}
        if self.samples != wanted:
            names = sorted(n for n, _ in self.samples.items() ^ wanted.items())
            names = list(dict.fromkeys(names))
            stale.append(f"the samples differ in {len(names)} files ({', '.join(names[:3])} ...)")
        if self.method != method:
            stale.append(f"the method was {self.method}, now it is {method}")
        elif method == "percentile" and self.percentile != percentile:
            stale.append(f"the percentile was {self.percentile}, now it is {percentile}")
        if stale:
            raise CalibrationError(
                f"the calibration table is stale: {'; '.join(stale)}", fix="calibrate again"
            )

    def save(self, path: Path) -> None:
        """Write it as JSON, in one step."""
        content = self.model_dump(mode="json")
        files.write(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def load(path: Path) -> Table:
    """Read a table that ``Table.save`` wrote.

    Raises:
        CalibrationError: missing, not JSON, of another schema, or with an unknown, missing or
            ill-typed field.
    """
    try:
        return Table.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise CalibrationError(f"there is no calibration table {path}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise CalibrationError(
            f"{path} is no calibration table of this version: {where}: {first['msg']}",
            fix="calibrate again",
        ) from error


def graph_sha256(bundle: Bundle, name: str) -> str | None:
    """SHA-256 of a graph's float file; None where the bundle has no such graph."""
    manifest = bundle.manifest
    if name not in manifest.graphs:
        return None
    return manifest.files[manifest.graphs[name].variants["float"]].sha256


def preprocess_sha256(spec: PreprocessSpec | PlanesSpec) -> str:
    """SHA-256 of a spec in its one spelling."""
    text = json.dumps(spec.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
