"""What part contrast costs: a whole step against plain two-view cross-entropy, and the loss alone.

    python -m tests.benchmarks.paco_step [resnet18 resnet50]

Random weights and noise for pictures: neither changes the time. Both kinds of step take turns, so
that what else the machine does meets both alike.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from engineworks.training import backbones
from engineworks.training.allocator import keep_freed_memory
from engineworks.training.config import BackboneConfig
from engineworks.training.systems.paco.config import LossConfig, PartsConfig
from engineworks.training.systems.paco.loss import PartLoss
from engineworks.training.systems.paco.model import Paco, PacoTraining

BATCH, SIZE, CLASSES, THREADS = 16, 224, 80, 2
STEPS = 10
PARTS = PartsConfig(num=4, width=64)
PUBLISHED = LossConfig(
    metric="pair",
    shrinkage=None,
    ridge=1e-2,
    normalise=False,
    matching="cosine",
    soc_normalise=False,
    saliency=0.1,
)


def step(name: str, loss: LossConfig) -> Callable[[], None]:
    """One step of training: forward, backward, AdamW."""
    backbone = backbones.create(BackboneConfig(name=name, weights="none"))
    net = Paco(backbone.net, backbone.channels[0], CLASSES)
    model = PacoTraining(net, PARTS, loss, num_classes=CLASSES).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    views = torch.randn(2, BATCH, 3, SIZE, SIZE)
    labels = torch.arange(BATCH) % CLASSES

    def run() -> None:
        # past the warm-up of the matching
        model(views, labels, ramp=1.0, epoch=loss.matching_warmup_epochs)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def whole_steps(name: str) -> None:
    plain = LossConfig(pac=0, soc=0)
    runs = {
        "cross-entropy": step(name, plain),
        "paco": step(name, LossConfig()),
        "paco, published metric": step(name, PUBLISHED),
        # the same thing twice: how much of a difference is noise
        "cross-entropy again": step(name, plain),
    }
    times: dict[str, list[float]] = {key: [] for key in runs}
    for turn in range(STEPS + 2):
        for key, run in runs.items():
            elapsed = milliseconds(run)
            if turn >= 2:
                times[key].append(elapsed)
    floor = times["cross-entropy"]
    print(f"\n{name}, batch {BATCH} x 2 views, {SIZE} px, {THREADS} threads, {STEPS} turns")
    for key, values in times.items():
        ratios = [a / b for a, b in zip(values, floor, strict=True)]
        print(
            f"{key:27s} median {statistics.median(values):8.1f} ms, "
            f"ratio per turn: median {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})"
        )


def loss_step(criterion: PartLoss, parts: Tensor, labels: Tensor) -> None:
    terms = criterion(parts, labels, 3)
    (terms["pac"] + terms["soc"]).backward()


def loss_alone() -> None:
    print(f"\nloss alone, forward and backward, K 4, d 64, {THREADS} threads: ms (and per B^2)")
    variants = {
        "ours": LossConfig(),
        "class": LossConfig(metric="class"),
        "published metric": PUBLISHED,
        "log-euclidean": LossConfig(soc_distance="log-euclidean"),
    }
    print(f"{'B':>4s}" + "".join(f"{name:>26s}" for name in variants))
    for batch in (8, 16, 32, 64, 128):
        labels = torch.arange(batch) % CLASSES
        parts = torch.randn(2, batch, 4, 64, requires_grad=True)
        cells = []
        for loss in variants.values():
            criterion = PartLoss(loss, CLASSES, 64).train()
            run = partial(loss_step, criterion, parts, labels)
            for _ in range(3):
                run()
            median = statistics.median(milliseconds(run) for _ in range(15))
            cells.append(f"{median:15.2f} ({1e3 * median / batch**2:6.1f} us)")
        print(f"{batch:4d}" + "".join(f"{cell:>26s}" for cell in cells))


if __name__ == "__main__":
    keep_freed_memory()  # as in training
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    loss_alone()
    for name in sys.argv[1:] or ["resnet18", "resnet50"]:
        whole_steps(name)
