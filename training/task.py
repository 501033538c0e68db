"""Task: how one system is trained, as the one loop of ``training.train`` sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

from pydantic import JsonValue
from torch import Tensor, nn
from torch.utils.data import DataLoader

from engineworks.runtime.labels import Labelled
from engineworks.training.run import Run

# (what is being done, so many done, of so many)
Progress: TypeAlias = Callable[[str, int, int], None]

# a column of metrics.csv, and whether more of it is better
Criterion: TypeAlias = tuple[str, Literal["max", "min"]]


@dataclass(frozen=True)
class Position:
    """Where the loop stands.

    Attributes:
        epoch: epochs done, the current one not counted.
        batch: batches of the current epoch done.
        step: optimizer steps done in the whole run.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0


class Task(Protocol):
    """Built as ``Task(config, data, root, weights=...)``.

    ``root`` is the run folder; ``weights=False`` when a checkpoint will fill the model, so that
    the starting weights need not be there any more. Where no parameter of ``model`` wants a
    gradient, the loop makes one pass per epoch without an optimizer.

    Where several processes train together, all of them call ``loader`` and ``step``, and the main
    process alone ``evaluate`` and ``finish``: see ``training.ranks``.

    Attributes:
        model: everything that learns or is saved; prototypes and the like are its buffers.
        best: what chooses weights/best: the first criterion, where epochs are equal in it the next
            one, and of epochs that are equal in all the later. Empty takes the last epoch.
        dataset: all that the data say, see ``runtime.labels``.
        data_summary: folder's name, counts and hash, for the record.
        provenance: where the starting weights came from.
        written: patterns of what it leaves in the run's folder, beyond what every run has.
        working: patterns of what it needs there until the run has finished; removed then.
    """

    written: ClassVar[tuple[str, ...]]
    working: ClassVar[tuple[str, ...]]
    model: nn.Module
    best: tuple[Criterion, ...]
    dataset: Labelled
    data_summary: dict[str, JsonValue]
    provenance: dict[str, JsonValue]

    def loader(self) -> DataLoader[Any]:
        """Training batches, from ``training.data.loader``: this rank's part of each."""
        ...

    def step(self, model: nn.Module, batch: Any, position: Position) -> Mapping[str, Tensor]:
        """Losses of a batch, scalars; ``loss`` is the one to minimise, the others are logged.

        Their mean over the ranks is what the whole batch has.

        Args:
            model: ``self.model`` as accelerate wrapped it; call this one.
            batch: already on the model's device.
        """
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Metrics after an epoch; ``model`` is in eval mode, averaged where that is configured."""
        ...

    def finish(self, run: Run, model: nn.Module, progress: Progress) -> dict[str, JsonValue]:
        """What is computed once after the last epoch; returns what the record should keep.

        Must be repeatable: a run that was interrupted here comes back here, and one that was
        stopped or gets more epochs comes again.

        Args:
            model: with the weights that ``run.weights()`` names, in eval mode.
        """
        ...


@runtime_checkable
class Paced(Protocol):
    """What a task may offer beyond ``Task``: parts that learn at rates of their own."""

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """All parameters that want a gradient now, with factors of ``train.optimizer.lr``; the
        rate of the first group is logged.
        """
        ...

    def pace(self, epoch: int) -> float:
        """Factor of all rates in an epoch, from 0."""
        ...
