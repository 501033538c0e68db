"""The rows of eager and compiled PyTorch in a benchmark, the same for every system."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from engineworks.runtime.bundle import Bundle
from engineworks.runtime.contenders import Contender
from engineworks.runtime.tensors import Array
from engineworks.training.systems import system_package

# images (B, 3, H, W) -> whatever the system's module returns
Network: TypeAlias = Callable[[Tensor], Any]


class EagerSystem(Protocol):
    """A system as a user of PyTorch would write it, around a network."""

    def forward(self, images_BCHW: Array) -> object:
        """The network alone, on a prepared batch of float32."""
        ...

    def infer(self, images: Sequence[Array]) -> object:
        """See ``runtime.systems.System.infer``."""
        ...


def of_run(
    run: Path, bundle: Bundle, *, threads: int, say: Callable[[str], None]
) -> list[Contender]:
    """The system of a bundle in eager PyTorch, with the weights of its training run.

    Raises:
        UsageError: the bundle's system is not trained.
        RunError: no run, or one that is not finished.
    """
    module = importlib.import_module(f"{system_package(bundle.manifest.system)}.eager")
    found: list[Contender] = module.contenders(run, bundle, threads=threads, say=say)
    return found


def contenders(
    module: nn.Module,
    system: Callable[[Network], EagerSystem],
    *,
    threads: int,
    say: Callable[[str], None],
) -> list[Contender]:
    """One contender per way to run a network: eager and compiled, each in float32 and bfloat16.

    Args:
        module: the trained network in eval mode; its weights are laid out channels_last.
        system: wraps a way to run the network.
        threads: of PyTorch, for the whole process.
    """
    torch.set_num_threads(threads)
    module.to(memory_format=torch.channels_last)
    ways: list[tuple[str, Network]] = [("eager channels_last", module)]
    if any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "g++"), "clang++")):
        say("torch.compile: the first call of each row takes its time")
        ways.append(("torch.compile", torch.compile(module)))
    else:
        say("no rows of torch.compile: it needs a C++ compiler, and none is installed")
    found = []
    for name, network in ways:
        for precision, run in (("float", network), ("bf16", _autocast(network))):
            around = system(run)
            found.append(
                Contender(
                    name=name,
                    precision=precision,
                    network=around.forward,
                    path=around.infer,
                    evaluate=None,
                    close=lambda: None,
                )
            )
    return found


def to_channels_last(images_BCHW: Array) -> Tensor:
    """A prepared batch in the layout of the weights."""
    return torch.from_numpy(images_BCHW).contiguous(memory_format=torch.channels_last)


def _autocast(network: Network) -> Network:
    def call(images_BCHW: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return network(images_BCHW)

    return call
