"""What processes that train together say to each other; a process that is alone talks to nobody.

A batch is shared: each rank computes losses of its part, and **the mean of a loss over the ranks is
the loss of the whole batch**. So the mean over samples is ``mean_loss``, or times ``weight``, for
parts may differ in size; a sum is divided by the ``mean`` of what all divide by; and what compares
samples with each other gathers them first (``gather``) and is then computed in every rank alike.
``average_gradients`` makes the same of the gradients.

Numbers and bytes go by gloo, tensors of a GPU by NCCL; nothing is pickled. A rank that ends closes
its connections, which ends the others.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from engineworks.runtime import signals
from engineworks.runtime.errors import BackendError, ConfigError, RankError
from engineworks.runtime.signals import Stopped
from engineworks.runtime.threads import available_threads
from engineworks.training.processes import Place, place
from engineworks.training.profiler import section

Value = TypeVar("Value")

_MEETING = timedelta(minutes=15)  # until all processes are there
_WAITING = timedelta(days=7)  # for one that evaluates, or fits a bank; one that is gone is noticed
_COMPUTING = timedelta(minutes=30)  # for a tensor on a GPU
_LOST = re.compile("onnect|peer|ocket|imed out")


@dataclass(frozen=True)
class Part:
    """What a rank takes of a batch: the ranks' parts lie one after the other and differ by one."""

    rank: int = 0
    size: int = 1

    def of(self, count: int, what: str = "samples") -> slice:
        """Of so many samples.

        Raises:
            ConfigError: there are too few for all.
        """
        if count < self.size:
            raise ConfigError(
                f"a batch of {count} {what} cannot be shared by {self.size} processes",
                fix="raise train.batch_size, or take fewer processes",
            )
        borders = [count * rank // self.size for rank in (self.rank, self.rank + 1)]
        return slice(*borders)


class _Group:
    """Those that have met.

    Attributes:
        place: of this process, its machine included.
        on_gpu: who passes on tensors of a GPU.
    """

    def __init__(self) -> None:
        self.place = Place(local_rank=0, local_size=1)
        self.on_gpu: dist.ProcessGroup | None = None


_group = _Group()


@contextmanager
def joined(device: str) -> Iterator[Place]:
    """Meet the other processes that the environment tells of, and part at the end of the block.

    Within it torch and OpenCV take this process's share of the machine's threads, and the CUDA
    device is its own.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UsageError: the environment is incomplete.
        BackendError: they cannot meet, or there are fewer GPUs than processes.
    """
    here = place()
    if here.size == 1:
        yield _group.place
        return
    before = _group.place, torch.get_num_threads(), cv2.getNumThreads()
    _meet(here)
    try:
        _group.place = here
        _group.place = here = _at_home(here)
        assert here.local_size is not None
        if device != "cpu" and torch.cuda.is_available():
            _take_gpu(here)
        threads = max(1, available_threads() // here.local_size)
        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)
        yield here
    finally:
        _group.place, threads, of_opencv = before
        _group.on_gpu = None
        torch.set_num_threads(threads)
        cv2.setNumThreads(of_opencv)
        dist.destroy_process_group()


def _meet(here: Place) -> None:
    try:
        store, rank, size = next(
            rendezvous("env://", rank=here.rank, world_size=here.size, timeout=_MEETING)
        )
        store.set_timeout(_MEETING)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_WAITING)
    except (RuntimeError, ValueError, OSError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise BackendError(
            f"the {here.size} processes cannot meet at {address}: {str(error).splitlines()[0]}",
            fix="check that MASTER_ADDR is a machine that all can reach, that MASTER_PORT is free "
            "there, and that all processes were started",
        ) from error


def _at_home(here: Place) -> Place:
    """With its number among the processes of its machine, where nobody said it."""
    hosts = [host.decode() for host in each(socket.gethostname().encode())]
    own = [rank for rank, host in enumerate(hosts) if host == hosts[here.rank]]
    local_rank = own.index(here.rank) if here.local_rank is None else here.local_rank
    return Place(here.rank, here.size, local_rank, here.local_size or len(own))


def _take_gpu(here: Place) -> None:
    assert here.local_rank is not None
    count = torch.cuda.device_count()
    if any_of(here.local_rank >= count):  # in all of them: none waits for one that has ended
        raise BackendError(
            f"there are machines with fewer GPUs than processes; this one has {count} and "
            f"{here.local_size}",
            fix="take as many processes as GPUs, or train on the CPU: --set train.device=cpu",
        )
    torch.cuda.set_device(here.local_rank)
    group = dist.new_group(backend="nccl", timeout=_COMPUTING)
    assert isinstance(group, dist.ProcessGroup)
    _group.on_gpu = group


@contextmanager
def _connected() -> Iterator[None]:
    """Tell when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        # gloo's errors of connections have no class of their own
        if not isinstance(error, dist.DistError) and not _LOST.search(str(error)):
            raise
        raise RankError(
            "another process of this training has ended",
            fix="see what it said; then go on with --resume",
        ) from error


# --- who is there --------------------------------------------------------------------------------


def here() -> Place:
    """The place of this process."""
    return _group.place


def size() -> int:
    """How many train together."""
    return _group.place.size


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return _group.place.is_main


def part() -> Part:
    """What this process takes of each batch."""
    return Part(_group.place.rank, _group.place.size)


def own_seed(seed: int) -> int:
    """Of the numbers that this rank draws; that of the main process stays as it is."""
    if is_main():
        return seed
    return int(np.random.default_rng((seed, _group.place.rank)).integers(2**32))


# --- tensors -------------------------------------------------------------------------------------


def total(value: Tensor) -> Tensor:
    """The sum over the ranks, without gradient."""
    if size() == 1:
        return value
    return _reduced(value.detach().clone())


def mean(value: Tensor) -> Tensor:
    """The mean over the ranks, without gradient."""
    return value if size() == 1 else torch.as_tensor(total(value) / size())


def weight(count: int) -> float:
    """What the mean over ``count`` samples of this rank weighs beside those of the others.

    It is 1 where all have as many.
    """
    if size() == 1:
        return 1.0
    return count * size() / int(total(torch.tensor(count)))


def mean_loss(loss_N: Tensor) -> Tensor:
    """Of (n, ...) losses of this rank what, averaged over the ranks, is the mean of all."""
    if size() == 1:
        return loss_N.mean()
    count = mean(loss_N.new_tensor(float(loss_N.numel())))
    return torch.as_tensor(loss_N.sum() / count)


def mean_value(value_N: Tensor) -> Tensor:
    """The mean of the (n, ...) values of all ranks, without gradient; 0 where there are none."""
    if size() == 1:
        return value_N.mean()
    found, count = total(torch.stack([value_N.sum(), value_N.new_tensor(float(value_N.numel()))]))
    return torch.as_tensor(found / count.clamp_min(1))


def any_of(flag: bool) -> bool:
    """Whether one of the ranks says so."""
    return flag if size() == 1 else bool(total(torch.tensor(int(flag))))


def gather(rows: Tensor) -> Tensor:
    """(n, ...) rows of this rank -> (sum of n, ...) of all, in the order of the ranks.

    With gradient: that of the sum of what all ranks make of them.
    """
    return rows if size() == 1 else torch.as_tensor(_Gather.apply(rows))


def stack(row: Tensor) -> Tensor:
    """(...) of this rank, of one shape in all -> (ranks, ...), without gradient."""
    return row[None] if size() == 1 else torch.stack(_gathered(row))


def draw(count: int, num: int, device: torch.device) -> Tensor:
    """Of the things that all ranks have, ``num`` at random: which of this rank's ``count``."""
    if size() == 1:
        return torch.randperm(count, device=device)[:num]
    counts = stack(torch.tensor(count)).tolist()
    first = sum(counts[: _group.place.rank])
    chosen = _broadcast(torch.randperm(sum(counts)))[:num] - first
    own: Tensor = chosen[(chosen >= 0) & (chosen < count)]
    return own.to(device)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        counts = [int(count) for count in _gathered(torch.tensor([len(rows)]))]
        first = sum(counts[: _group.place.rank])
        ctx.own = slice(first, first + len(rows))
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        found = _gathered(padded)
        return torch.cat([each[:count] for each, count in zip(found, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        return torch.as_tensor(_reduced(gradient)[ctx.own])


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Let every rank have the mean of all ranks' gradients.

    What no rank has a gradient of is left without one.
    """
    if size() == 1:
        return
    wanting = [each for each in parameters if each.requires_grad]
    with section("ranks"):
        found = [torch.zeros_like(each) if each.grad is None else each.grad for each in wanting]
        has = found[0].new_tensor([float(each.grad is not None) for each in wanting])
        flat = _reduced(torch.cat([*(each.flatten() for each in found), has])) / size()
        told = flat[-len(has) :].tolist()
        pieces = torch.split(flat[: -len(has)], [each.numel() for each in wanting])
        for parameter, gradient, piece, some in zip(wanting, found, pieces, told, strict=True):
            if some:
                parameter.grad = gradient.copy_(piece.view_as(gradient))


def align(module: nn.Module) -> None:
    """Give all ranks the parameters and buffers of the main process."""
    if size() > 1:
        for value in (*module.parameters(), *module.buffers()):
            value.data.copy_(_broadcast(value.data.contiguous()))


def _pick(tensor: Tensor) -> dist.ProcessGroup | None:
    return _group.on_gpu if tensor.is_cuda else None


def _reduced(tensor: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    """The sum over the ranks, in the place of the tensor."""
    with _connected():
        dist.all_reduce(tensor, operation, group=_pick(tensor))
    return tensor


def _gathered(tensor: Tensor) -> list[Tensor]:
    """Tensors of one shape of all ranks."""
    tensor = tensor.contiguous()
    found = [torch.empty_like(tensor) for _ in range(size())]
    with _connected():
        dist.all_gather(found, tensor, group=_pick(tensor))
    return found


def _broadcast(tensor: Tensor) -> Tensor:
    """The main process's, in the place of the tensor."""
    with _connected():
        dist.broadcast(tensor, 0, group=_pick(tensor))
    return tensor


# --- words ---------------------------------------------------------------------------------------


def each(content: bytes) -> list[bytes]:
    """What every rank says, in the order of the ranks; all get it."""
    if size() == 1:
        return [content]
    row = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    counts = [int(count) for count in _gathered(torch.tensor([len(row)]))]
    padded = row.new_zeros(max(counts))
    padded[: len(row)] = row
    found = zip(_gathered(padded), counts, strict=True)
    return [piece[:count].numpy().tobytes() for piece, count in found]


def tell(value: Value) -> Value:
    """What the main process says: anything that JSON can hold. All get it."""
    if size() == 1:
        return value
    content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    count = int(_broadcast(torch.tensor([len(content)])))
    content = content if is_main() else torch.empty(count, dtype=torch.uint8)
    said: Value = json.loads(_broadcast(content).numpy().tobytes())
    return said


def wait() -> None:
    """Until all have come here."""
    if size() > 1:
        with _connected():
            dist.barrier()


def from_main(make: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """Tensors that the main process makes; the others wait for them, and get copies."""
    if size() == 1:
        return list(make())
    made = [each.contiguous() for each in make()] if is_main() else []
    told = tell([(list(each.shape), str(each.dtype).removeprefix("torch.")) for each in made])
    if not is_main():
        made = [torch.empty(shape, dtype=getattr(torch, dtype)) for shape, dtype in told]
    return [_broadcast(each) for each in made]


@contextmanager
def first_here() -> Iterator[None]:
    """The first process of each machine does what is in the block, then the others do."""
    if _group.place.local_rank:
        wait()
    yield
    if not _group.place.local_rank:
        wait()


# --- the way to the end --------------------------------------------------------------------------


def by_main(work: Callable[[], None]) -> None:
    """The main process works, and may be stopped; the others wait until it is done.

    Raises:
        Stopped: in all of them, where the main process was.
    """
    if size() == 1:
        work()
        return
    number = 0
    if is_main():
        try:
            with signals.broken(), _all_threads():
                work()
        except Stopped as stopped:
            number = stopped.number
    if number := tell(number):
        signals.end(number)


@contextmanager
def _all_threads() -> Iterator[None]:
    """Those of the processes that wait as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(available_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stop_together() -> None:
    """Stop all where one was asked to; called by all after the same step.

    Raises:
        Stopped: in all of them.
    """
    if size() > 1 and (number := _highest(signals.asked())):
        signals.end(number)


def _highest(number: int) -> int:
    """Of all ranks."""
    return int(_reduced(torch.tensor([number]), dist.ReduceOp.MAX))
