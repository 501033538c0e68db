"""An export under way: the bundle so far, and what its stages have learnt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from engineworks.calibration.table import Table
from engineworks.export.config import ExportConfig
from engineworks.export.parity import Feeds
from engineworks.export.quantize import KeepFloat
from engineworks.export.sensitivity import NodeCost
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.plans import Profile
from engineworks.runtime.usual import Usual

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]


@dataclass
class Calibration:
    """What calibration leaves to the stages that follow.

    Attributes:
        floats: graph name -> its float graph.
        keep: graph name -> what INT8 leaves alone; relaxed by a gate that fails.
        feeds: what the deployed system feeds its graphs.
        table: the ranges that were taken.
        errors: method of ranges -> error of the outputs; empty where a method was asked for.
        num_samples: images that were shown.
        usual: what they are like.
        costs: graph name -> what each node costs, the worst first; empty where nobody asked.
    """

    floats: Mapping[str, onnx.ModelProto]
    keep: Mapping[str, KeepFloat]
    feeds: Feeds
    table: Table
    errors: Mapping[str, float]
    num_samples: int
    usual: Usual
    costs: Mapping[str, list[NodeCost]] = field(default_factory=dict)


class Job:
    """What the stages of an export hand on.

    Attributes:
        source: a run, a bundle, or SYSTEM:NAME.
        config: what is asked for.
        say: called with a line of text per step.
        progress: called with (what, done, of).
        bundle: the last one that is whole and on the disk, to be opened.
        manifest, files: what will be written: that bundle, and what was added since.
        profiles: graph name -> shapes of its plans.
        calibration: see there; only with ``int8``.
    """

    bundle: Bundle
    calibration: Calibration

    def __init__(
        self,
        source: Path | Bundle,
        config: ExportConfig,
        folder: Path,
        *,
        say: Say,
        progress: Progress,
    ) -> None:
        self.source = source
        self.config = config
        self.say = say
        self.progress = progress
        self.profiles: dict[str, list[Profile]] = {}
        self._folder = folder

    def room(self, name: str) -> Path:
        """A folder of the scratch space; it is not made."""
        return self._folder / name

    def take(self, bundle: Bundle) -> None:
        """Go on with this bundle."""
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.files = {name: bundle.path(name) for name in bundle.manifest.files}

    def add(self, graph: str, variant: str, file: str) -> Path:
        """The place of a new variant's file, listed under its name."""
        entry = self.manifest.graphs[graph]
        variants = {**entry.variants, variant: file}
        changed = entry.model_copy(update={"variants": variants})
        self.update(graphs={**self.manifest.graphs, graph: changed})
        self.files[file] = self._folder / file
        return self.files[file]

    def path(self, graph: str, variant: str) -> Path:
        """The file of a variant."""
        return self.files[self.manifest.graphs[graph].variants[variant]]

    def update(self, **fields: Any) -> None:
        """Change fields of the manifest."""
        self.manifest = self.manifest.model_copy(update=fields)

    def report(self, **reports: Any) -> None:
        """Add reports to the manifest, or replace them."""
        self.update(reports={**self.manifest.reports, **reports})
