"""Seeded loaders: what a sample is depends on (seed, epoch, index) and on nothing else.

Not on the number of workers, on what a worker drew before, nor on where a resumed run took up
again. Pixels of an evaluation pass through ``runtime.preprocess.apply`` and nowhere else.
"""

from __future__ import annotations

import gc
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    Sampler,
    default_collate,
    default_convert,
)

from engineworks.runtime.bundle import sha256_file
from engineworks.runtime.errors import ConfigError, EngineworksError, RunError
from engineworks.runtime.labels import Labelled
from engineworks.runtime.preprocess import PreprocessSpec, apply
from engineworks.runtime.tensors import Array
from engineworks.training.config import TrainConfig
from engineworks.training.ranks import Part

Key: TypeAlias = tuple[int, int]
WHOLE = Part()


class Samples(Protocol):
    """What a task trains on or is evaluated on."""

    def __len__(self) -> int: ...

    def get(self, index: int, rng: np.random.Generator) -> Any:
        """One sample, ready to be collated; all its randomness from ``rng`` (or from torch's
        global generator, which is seeded alike).
        """
        ...


@dataclass(frozen=True)
class _Failure:
    """Why there is no sample: torch would turn an error of a worker into another one's text."""

    error: EngineworksError


class _Seeded(Dataset[Any]):
    """Hands every sample its own generator."""

    def __init__(self, samples: Samples, seed: int) -> None:
        self.samples = samples
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> Any:
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        # torchvision's transforms use torch's generator; torch.manual_seed would seed all backends'
        before = torch.default_generator.get_state()
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        try:
            return self.samples.get(index, rng)
        except EngineworksError as error:
            return _Failure(error)
        finally:
            torch.default_generator.set_state(before)


class EpochSampler(Sampler[Key]):
    """Keys (epoch, index): in order, or in a permutation of (seed, epoch)."""

    def __init__(self, num: int, *, seed: int, shuffle: bool) -> None:
        self.num = num
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num

    def __iter__(self) -> Iterator[Key]:
        order = np.arange(self.num)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num)
        return ((self.epoch, int(index)) for index in order)


class Shares(Sampler[list[Key]]):
    """What one of several ranks takes of batches that all of them draw alike.

    Attributes:
        sampler: of the keys.
    """

    def __init__(self, batches: BatchSampler, part: Part, *, whole: bool) -> None:
        """Check that there is something for all.

        Args:
            whole: each rank takes batches of its own, in turn; where the last turn has too few, its
                last batch is taken by several. Else a part of each batch.

        Raises:
            ConfigError: a batch has fewer samples than there are ranks.
        """
        self.batches: Any = batches
        self.sampler: Any = batches.sampler
        self.part = part
        self.whole = whole
        if not whole:
            part.of(batches.batch_size)
            self._check_last()

    def __len__(self) -> int:
        return math.ceil(len(self.batches) / self.part.size) if self.whole else len(self.batches)

    def __iter__(self) -> Iterator[list[Key]]:
        if not self.whole:
            for keys in self.batches:
                yield keys[self.part.of(len(keys))]
            return
        turn: list[list[Key]] = []
        for keys in self.batches:
            turn.append(keys)
            if len(turn) == self.part.size:
                yield turn[self.part.rank]
                turn = []
        if turn:
            yield turn[min(self.part.rank, len(turn) - 1)]

    def _check_last(self) -> None:
        num, size = len(self.sampler), self.batches.batch_size
        left = num % size
        if self.batches.drop_last or left == 0 or left >= self.part.size:
            return
        ranks = self.part.size
        fitting = [n for n in range(ranks, 2 * size) if num % n == 0 or num % n >= ranks]
        nearest = sorted(fitting, key=lambda n: abs(n - size))[:2]
        raise ConfigError(
            f"the last batch of an epoch has {left} of {num} samples, too few for "
            f"{ranks} processes",
            fix=f"set train.batch_size to {' or '.join(map(str, nearest))}",
        )


def loader(
    samples: Samples,
    config: TrainConfig,
    *,
    shuffle: bool,
    drop_last: bool = False,
    batched: bool = False,
    part: Part = WHOLE,
    whole: bool = False,
) -> DataLoader[Any]:
    """Batches of samples, collated by torch's default rules (arrays stack along a new axis).

    To be read by ``iterate``, which raises what a sample raised.

    Args:
        batched: each sample is a whole batch already; its arrays become tensors, no axis is added.
        part, whole: what this rank takes, see ``Shares``; of samples that are whole batches it
            takes its part itself.

    Raises:
        ConfigError: see ``Shares``.
    """
    sampler = EpochSampler(len(samples), seed=config.seed, shuffle=shuffle)
    batches: dict[str, Any] = {
        "batch_size": 1 if batched else config.batch_size,
        "sampler": sampler,
        "drop_last": drop_last,
    }
    if part.size > 1 and not batched:
        keys: Any = sampler  # torch's types know numbers alone
        shared = BatchSampler(keys, config.batch_size, drop_last)
        batches = {"batch_sampler": Shares(shared, part, whole=whole)}
    return DataLoader(
        _Seeded(samples, config.seed),
        collate_fn=partial(_collate, _only if batched else default_collate),
        num_workers=config.workers,
        prefetch_factor=config.prefetch if config.workers else None,
        pin_memory=config.pin_memory and torch.cuda.is_available(),  # torch warns without one
        persistent_workers=config.workers > 0,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(config.seed),
        **batches,
    )


def iterate(loader: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader, or of what accelerate made of it.

    Raises:
        EngineworksError: what a sample raised, in whichever process.
        RunError: a process of the loader is gone.
    """
    try:
        for batch in loader:
            if isinstance(batch, _Failure):
                raise batch.error
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RunError(
            f"a process that loads pictures has ended: {' '.join(str(error).split())}",
            fix="there may be too little memory: lower train.workers, train.batch_size or "
            "train.prefetch; then go on with --resume",
        ) from error


def preprocess(spec: PreprocessSpec, images: Sequence[Array]) -> Tensor:
    """(H, W, 3) uint8 RGB images -> (B, 3, height, width) float32, as at inference."""
    return torch.from_numpy(apply(spec, images))


def fingerprint(root: Path, files: Sequence[Path]) -> str:
    """SHA-256 over names (relative to ``root``) and contents, in the order of the names."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(root).as_posix()} {sha256_file(file)}\n".encode())
    return digest.hexdigest()


def labels_fingerprint(labelled: Labelled) -> str:
    """SHA-256 over all that is said of a data set: every split, name, label, box and mask, and the
    content of all files but those that are trained on, which have a fingerprint of their own.
    """
    digest = hashlib.sha256()
    hashes = {file: "" for item in labelled.splits.get("train", ()) for file in item.files}
    for split, items in labelled.splits.items():
        for item in items:
            for file in [*item.files, *([item.mask] if item.mask else ())]:
                if file not in hashes:
                    hashes[file] = sha256_file(file)
            said = (split, item.name, item.label, item.boxes, item.frame)
            mask = hashes[item.mask] if item.mask else None
            digest.update(repr((said, [hashes[file] for file in item.files], mask)).encode())
    return digest.hexdigest()


def _collate(collate: Callable[[list[Any]], Any], samples: list[Any]) -> Any:
    failures = [sample for sample in samples if isinstance(sample, _Failure)]
    return failures[0] if failures else collate(samples)


def _only(samples: Sequence[Any]) -> Any:
    (sample,) = samples
    return default_convert(sample)  # type: ignore[no-untyped-call]


def _start_worker(_: int) -> None:
    # what the parent left to be collected is the parent's: to free a decoder whose threads were not
    # forked along waits for them for ever
    gc.freeze()
    cv2.setNumThreads(0)  # the workers are the threads
