from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engineworks.training.config import load_config
from engineworks.training.systems.noising.model import (
    ChannelPool,
    PatchFeatures,
    neighbourhood_mean,
    roots,
    side_by_side,
)
from engineworks.training.systems.noising.task import build_model

pytestmark = pytest.mark.train


def sum_of_nine(maps: Tensor) -> Tensor:
    weight = torch.ones(maps.shape[1], 1, 3, 3).double()
    return F.conv2d(maps, weight, padding=1, groups=maps.shape[1])


def averaged(finer: Tensor, grid: tuple[int, int]) -> Tensor:
    """Means over the positions of a grid, one by one; between centres where none is whole."""
    down, across = (size / cells for size, cells in zip(finer.shape[2:], grid, strict=True))
    if down % 1 or across % 1:
        return F.interpolate(finer, grid, mode="bilinear")
    rows = [finer[:, :, int(i * down) : int((i + 1) * down)].mean(2) for i in range(grid[0])]
    tall = torch.stack(rows, 2)
    columns = [tall[..., int(i * across) : int((i + 1) * across)].mean(3) for i in range(grid[1])]
    return torch.stack(columns, 3)


def reference(
    maps: list[Tensor],
    width: int | None,
    neighbourhood: Any = "zeros",
    scale: Any = "roots",
    patches: int | None = None,
    deep: float = 1.0,
) -> Tensor:
    """The same in the textbook's order, in float64: mean, roots, resize, stack, pool, rows; or as
    before there were roots: resize, stack, mean of the part inside, pool, rows.
    """
    maps = [m.double() for m in maps]
    sizes = [m.shape[2:] for m in maps]
    grid = tuple(max(sizes, key=lambda hw: hw[0] * hw[1]) if patches is None else sizes[patches])
    if neighbourhood == "zeros":
        maps = [sum_of_nine(m) / 9 for m in maps]
    count = grid[0] * grid[1]
    maps = [averaged(m, grid) if m[0, 0].numel() > count else m for m in maps]
    if scale == "roots":
        maps = [
            torch.copysign(m.abs() ** 0.5, m) / (m.abs().sum(1, keepdim=True) ** 0.5 + 1e-3) ** 0.5
            for m in maps
        ]
    maps = [m * deep if m[0, 0].numel() < count else m for m in maps]
    stacked = torch.cat([F.interpolate(m, grid, mode="bilinear") for m in maps], 1)
    if neighbourhood == "inside":
        stacked = sum_of_nine(stacked) / sum_of_nine(torch.ones_like(stacked))
    rows = stacked.permute(0, 2, 3, 1).flatten(1, 2)
    return rows if width is None else nn.AdaptiveAvgPool1d(width)(rows)


class Maps(nn.Module):
    """A backbone that gives what it was made with."""

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.maps


class TestPatchFeatures:
    @settings(deadline=None, max_examples=60)
    @given(
        channels=st.lists(st.integers(1, 12), min_size=1, max_size=3),
        grids=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=3, max_size=3),
        width=st.none() | st.integers(1, 40),
        neighbourhood=st.sampled_from(["zeros", "inside", "none"]),
        scale=st.sampled_from(["roots", "none"]),
        patches=st.none() | st.just(0),
        deep=st.sampled_from([1.0, 0.5]),
        seed=st.integers(0, 99),
    )
    def test_are_the_textbooks(
        self,
        channels: list[int],
        grids: list[tuple[int, int]],
        width: int | None,
        neighbourhood: Any,
        scale: Any,
        patches: int | None,
        deep: float,
        seed: int,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        maps = [
            torch.randn(2, c, *grid, generator=generator)
            for c, grid in zip(channels, grids, strict=False)
        ]
        model = PatchFeatures(Maps(maps), channels, width, neighbourhood, scale, patches, deep)
        got = model(torch.zeros(2, 3, 8, 8))
        assert got.dtype == torch.float32
        want = reference(maps, width, neighbourhood, scale, patches, deep)
        # a few float32 roundings of numbers of size 1; a root makes those of 0 as large as 3e-4
        torch.testing.assert_close(
            got.double(), want, rtol=0, atol=5e-6 if scale == "none" else 1e-3
        )

    def test_of_finer_maps_are_means_over_whole_positions(self) -> None:
        fine, coarse = torch.randn(1, 2, 8, 12), torch.randn(1, 3, 2, 3)
        model = PatchFeatures(Maps([fine, coarse]), [2, 3], scale="none", patches=1)
        got = model(torch.zeros(1, 3, 16, 24))
        assert got.shape == (1, 6, 5)
        torch.testing.assert_close(
            got.double(), reference([fine, coarse], None, scale="none", patches=1)
        )

    def test_rows_run_along_the_rows_of_the_picture(self) -> None:
        rows = PatchFeatures.rows(torch.arange(6.0).reshape(1, 1, 2, 3))
        assert rows[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5]

    def test_of_an_image_do_not_depend_on_its_batch(self) -> None:
        conv = nn.Conv2d(3, 6, 3, stride=4)
        model = PatchFeatures(_List(conv), [6], 4, scale="none")
        images = torch.randn(3, 3, 32, 32)
        with torch.no_grad():
            # convolutions may sum in another order for another batch size; a root would make what
            # that does to a sum near 0 as large as 3e-4
            torch.testing.assert_close(model(images)[1:2], model(images[1:2]), rtol=0, atol=1e-6)

    def test_say_their_grid_and_width(self) -> None:
        model = PatchFeatures(_List(nn.Conv2d(3, 6, 4, stride=4)), [6], None)
        assert (model.grid(32, 48), model.width) == ((8, 12), 6)


@pytest.mark.parametrize(
    ("stride", "height", "grid"),
    # as fine or finer; none is as fine; as runs do that do not say; 60 px are 7.5 patches
    [
        ("8", 64, (8, 12)),
        ("11", 64, (8, 12)),
        ("16", 64, (4, 6)),
        ("3", 64, (16, 24)),
        ("null", 64, (16, 24)),
        ("8", 60, (8, 12)),
    ],
)
def test_the_coarsest_map_that_is_fine_enough_has_the_patches(
    stride: str, height: int, grid: tuple[int, int]
) -> None:
    net = ["backbone.name=resnet10t", "backbone.weights=none", "backbone.stages=[1, 2, 3]"]
    size = f"preprocess.size=[{height}, 96]"
    config = load_config("noising", None, [*net, size, f"stride={stride}"])
    model, _ = build_model(config)  # type: ignore[arg-type]
    assert isinstance(model, PatchFeatures)
    assert model.grid(height, 96) == grid
    with torch.inference_mode():
        rows = model(torch.zeros(1, 3, height, 96))
    assert rows.shape == (1, grid[0] * grid[1], sum(model.widths))


class _List(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.inner(images)]


class TestPoolingAlongTheChannels:
    @settings(deadline=None)
    @given(channels=st.integers(1, 300), width=st.integers(1, 300))
    def test_is_adaptive_average_pooling(self, channels: int, width: int) -> None:
        maps = torch.randn(1, channels, 2, 1, generator=torch.Generator().manual_seed(0))
        want = nn.AdaptiveAvgPool1d(width)(maps.double().flatten(2).mT).mT.reshape(1, width, 2, 1)
        # float32 mean of at most 300 numbers of size 1
        torch.testing.assert_close(
            ChannelPool(channels, width)(maps).double(), want, rtol=0, atol=1e-5
        )

    def test_keeps_nothing_in_the_state(self) -> None:
        assert not ChannelPool(10, 4).state_dict()


@pytest.mark.data
def test_alignment_is_that_of_the_published_code(shared: Path) -> None:
    fixture = np.load(shared / "fixtures/noising_aggregate.npz")
    maps = [torch.from_numpy(fixture[name]) for name in ("layer2", "layer3")]
    # float32 interpolation on both sides
    np.testing.assert_allclose(
        PatchFeatures.rows(side_by_side(maps)).numpy(), fixture["aggregated"], rtol=0, atol=1e-6
    )


def test_a_neighbourhood_at_the_border_counts_zeros_or_the_part_inside() -> None:
    ramp = torch.arange(9.0).reshape(1, 1, 3, 3)
    inside = torch.tensor([0.0, 1, 3, 4])
    assert neighbourhood_mean(ramp, zeros=False)[0, 0, 0, 0] == inside.mean()
    assert neighbourhood_mean(ramp, zeros=True)[0, 0, 0, 0] == pytest.approx(inside.sum() / 9)


class TestRoots:
    def test_take_half_of_the_contrast_out(self) -> None:
        maps = torch.rand(2, 16, 3, 3) + 0.1
        # twice the root of a value, over the root of twice the length
        torch.testing.assert_close(roots(16 * maps), 2 * roots(maps), rtol=1e-3, atol=0)

    def test_keep_the_sign(self) -> None:
        maps = torch.randn(2, 16, 3, 3)
        assert torch.equal(roots(maps).sign(), maps.sign())

    def test_of_nothing_are_nothing(self) -> None:
        assert torch.equal(roots(torch.zeros(1, 4, 2, 2)), torch.zeros(1, 4, 2, 2))
