"""Checkpoints: everything a run needs to go on, in one safetensors file.

Tensors are stored as tensors; the numbers, names and nesting around them as JSON in the file's
header. One file, replaced in one step, so model, optimizer and position cannot belong to different
moments. No pickle: a checkpoint from elsewhere can be read without running its code.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from engineworks.runtime import files
from engineworks.runtime.errors import RunError

NAME = "checkpoint.safetensors"
_LENGTH = 8  # bytes of a safetensors file that say how long its header is


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a tree, see ``dumps``; the file is replaced in one step."""
    files.write(path, dumps(state))


def dumps(state: Mapping[str, Any]) -> bytes:
    """A tree of tensors and plain values as the content of a file.

    Args:
        state: dicts, lists and tuples of tensors, numbers, texts, bools and None; state dicts of
            modules, optimizers and schedulers are such trees.

    Raises:
        TypeError: a value of another kind.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _pack(state, tensors, "")
    return bytes(to_bytes(tensors, metadata={"tree": json.dumps(skeleton)}))


def load(path: Path) -> dict[str, Any]:
    """The tree that ``save`` was given; tensors on the CPU.

    Raises:
        RunError: no such file, or not a whole checkpoint.
    """
    if not path.is_file():
        raise RunError(f"there is no checkpoint {path}", fix="check the path of the run")
    try:
        with safe_open(path, framework="pt") as file:
            tree = json.loads(file.metadata()["tree"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise RunError(
            f"{path} is not a whole checkpoint ({error})",
            fix="copy the run again, or train anew",
        ) from error
    return dict(_unpack(tree, tensors))


def loads(content: bytes) -> dict[str, Any]:
    """The tree that ``dumps`` was given."""
    end = _LENGTH + int.from_bytes(content[:_LENGTH], "little")
    tree = json.loads(json.loads(content[_LENGTH:end])["__metadata__"]["tree"])
    return dict(_unpack(tree, from_bytes(content)))


def latest(run: Path) -> Path | None:
    """The checkpoint of a run folder, or None where it has none yet."""
    path = run / NAME
    return path if path.is_file() else None


def rng_state() -> dict[str, Any]:
    """State of every generator that training may draw from in this process."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": _plain(np.random.get_state(legacy=False)),  # noqa: NPY002 - augmentations use it
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what ``rng_state`` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def _plain(value: Any) -> Any:
    """NumPy's bit generator state with tensors for arrays."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def _pack(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """JSON in which a tensor is its name; what JSON has no word for is a list with a tag."""
    if isinstance(value, Tensor):
        # a copy of its own: safetensors refuses tensors that share memory
        tensors[path] = value.detach().cpu().clone().contiguous()
        return {"tensor": path}
    if isinstance(value, Mapping):
        pairs = [[key, _pack(inner, tensors, f"{path}/{key}")] for key, inner in value.items()]
        return {"dict": pairs}
    if isinstance(value, list | tuple):
        items = [_pack(inner, tensors, f"{path}/{i}") for i, inner in enumerate(value)]
        return {type(value).__name__: items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__} (at '{path}')")


def _unpack(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(inner, tensors) for key, inner in content}
    items = [_unpack(inner, tensors) for inner in content]
    return tuple(items) if kind == "tuple" else items
