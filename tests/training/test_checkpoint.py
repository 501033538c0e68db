from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from engineworks.runtime.errors import RunError
from engineworks.training import checkpoint

pytestmark = pytest.mark.train

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text("abc/.", max_size=3) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=12,
)


class TestACheckpoint:
    # the folder may be shared between examples: each overwrites the file
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(tree=trees)
    def test_gives_back_any_tree_of_plain_values(self, tree: Any, tmp_path: Path) -> None:
        checkpoint.save(tmp_path / "c", {"tree": tree})
        assert checkpoint.load(tmp_path / "c") == {"tree": tree}

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.arange(6.0).reshape(2, 3).T,
            torch.tensor(3),
            torch.zeros(0, 4),
            torch.tensor([True, False]),
            torch.randn(3).bfloat16(),
        ],
        ids=["not contiguous", "scalar", "empty", "bool", "bfloat16"],
    )
    def test_gives_back_tensors(self, tensor: torch.Tensor, tmp_path: Path) -> None:
        checkpoint.save(tmp_path / "c", {"a": [tensor, {"b": tensor}]})
        a = checkpoint.load(tmp_path / "c")["a"]
        for got in (a[0], a[1]["b"]):
            assert got.dtype == tensor.dtype
            assert torch.equal(got, tensor)

    def test_carries_an_optimizer_on(self, tmp_path: Path) -> None:
        nets = [nn.Linear(3, 2) for _ in range(2)]
        nets[1].load_state_dict(nets[0].state_dict())
        adams = [torch.optim.AdamW(net.parameters(), lr=0.1) for net in nets]

        def step(i: int) -> None:
            nets[i](torch.ones(1, 3)).sum().backward()
            adams[i].step()
            adams[i].zero_grad()

        step(0)
        checkpoint.save(
            tmp_path / "c", {"net": nets[0].state_dict(), "adam": adams[0].state_dict()}
        )
        state = checkpoint.load(tmp_path / "c")
        nets[1].load_state_dict(state["net"])
        adams[1].load_state_dict(state["adam"])
        step(0), step(1)
        assert torch.equal(nets[0].weight, nets[1].weight)

    def test_carries_every_random_generator_on(self, tmp_path: Path) -> None:
        def draw() -> list[float]:
            return [random.random(), float(np.random.rand()), float(torch.rand(1))]  # noqa: NPY002

        checkpoint.save(tmp_path / "c", checkpoint.rng_state())
        first = draw()
        checkpoint.set_rng_state(checkpoint.load(tmp_path / "c"))
        assert draw() == first

    def test_refuses_what_is_no_plain_value(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="cannot hold a PosixPath"):
            checkpoint.save(tmp_path / "c", {"a": tmp_path})

    def test_survives_a_failed_write_of_the_next(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checkpoint.save(tmp_path / "c", {"a": 1})

        def full(descriptor: int) -> None:
            raise OSError("no space left")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="no space"):
            checkpoint.save(tmp_path / "c", {"a": 2})
        monkeypatch.undo()
        assert checkpoint.load(tmp_path / "c") == {"a": 1}
        assert [p.name for p in tmp_path.iterdir()] == ["c"]

    @pytest.mark.parametrize("keep", [0, 7, 100, -1])
    def test_that_is_truncated_is_refused(self, keep: int, tmp_path: Path) -> None:
        path = tmp_path / "c"
        checkpoint.save(path, {"a": torch.ones(100)})
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(RunError, match="not a whole checkpoint"):
            checkpoint.load(path)

    def test_that_is_missing_is_named(self, tmp_path: Path) -> None:
        assert checkpoint.latest(tmp_path) is None
        with pytest.raises(RunError, match="no checkpoint"):
            checkpoint.load(tmp_path / checkpoint.NAME)
