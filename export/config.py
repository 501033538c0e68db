"""What an export is asked for: one object for all of its stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from engineworks.calibration import ranges
from engineworks.export.halve import TYPES, HalfType
from engineworks.runtime.errors import UsageError
from engineworks.runtime.plans import PLANS, PlanConfig

METHODS = ("auto", *ranges.METHODS)


@dataclass(frozen=True)
class ExportConfig:
    """What ``pipeline.export`` is asked for. Without ``int8``, ``halves`` and ``plans``: a float
    bundle.

    Attributes:
        options: of a source SYSTEM:NAME, as its recipe's ``prepare`` takes them; of a run
            ``weights`` alone, ``best`` or ``last``.
        data: what the source, a run, was trained on; see ``trace.trace``.
        references: pictures of what the bundle looks for unasked.
        samples: folder of images that the system will meet; INT8 is calibrated on them, and 16-bit
            graphs are checked on them, or on seeded noise where there are none.
        threads: CPU threads; None takes all cores that this process may use.
        int8: add INT8 graphs.
        num_samples: how many samples calibration is shown.
        seed: of their choice.
        method: one of ``METHODS``.
        percentile: of method ``percentile``.
        evaluation: labelled folder for the gate; without one, INT8 does not ship.
        unjudged: ship INT8 that nothing has judged, where it pays.
        sensitivity: measure each node's cost, and put the worst back to float while the gate fails.
        fail_on_drop: raise where the gate fails; needs ``evaluation``.
        seconds: that float and INT8 are timed beside each other on each backend, at least five
            turns of each all the same.
        halves: 16-bit types to write mixed ONNX graphs in.
        plans: precisions to build plans of, names in ``PLANS``; those of 16 bits imply their graph.
        plan: how plans are built.
        timing_cache: folder for timings of kernels; None keeps none.
    """

    options: Mapping[str, str] = field(default_factory=dict)
    data: Path | None = None
    references: Path | None = None
    samples: Path | None = None
    threads: int | None = None
    int8: bool = False
    num_samples: int = 64
    seed: int = 0
    method: str = "auto"
    percentile: float = ranges.DEFAULT_PERCENTILE
    evaluation: Path | None = None
    unjudged: bool = False
    sensitivity: bool = False
    fail_on_drop: bool = False
    seconds: float = 10.0
    halves: tuple[str, ...] = ()
    plans: tuple[str, ...] = ()
    plan: PlanConfig = field(default_factory=PlanConfig)
    timing_cache: Path | None = None

    @property
    def half_types(self) -> tuple[HalfType, ...]:
        """16-bit types that are needed, those of plans included."""
        return tuple(kind for kind in TYPES if kind in (*self.halves, *self.plans))

    @property
    def changes(self) -> bool:
        """Whether a float bundle becomes another one."""
        return bool(self.references or self.int8 or self.halves or self.plans)

    def check(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            UsageError: an option without the one that gives it a meaning, two that exclude each
                other, or an unknown precision.
        """
        if unknown := set(self.plans) - set(PLANS) or set(self.halves) - set(TYPES):
            raise UsageError(
                f"there is no precision {', '.join(sorted(unknown))} here",
                fix=f"plans: {', '.join(PLANS)}; 16-bit graphs: {', '.join(TYPES)}",
            )
        if not self.plans and (self.plan != PlanConfig() or self.timing_cache):
            raise UsageError("options of plans have no meaning without --plan", fix="add --plan")
        if self.int8:
            self._check_int8()
            return
        given = {
            "--eval": self.evaluation,
            "--unjudged": self.unjudged,
            "--fail-on-drop": self.fail_on_drop,
            "--samples": None if self.halves or self.plans else self.samples,
        }
        if unused := [name for name, value in given.items() if value]:
            raise UsageError(f"{', '.join(unused)} has no meaning without --int8", fix="add --int8")

    def _check_int8(self) -> None:
        if self.samples is None:
            raise UsageError("--int8 needs sample images", fix="pass --samples DIR")
        if self.fail_on_drop and self.evaluation is None:
            raise UsageError("a drop cannot fail without labelled data", fix="pass --eval DIR")
        if self.unjudged and self.evaluation is not None:
            raise UsageError(
                "labelled data judge INT8, --unjudged does not", fix="leave one of them out"
            )
