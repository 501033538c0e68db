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

from engineworks.runtime.errors import InputError
from engineworks.training.profiler import Profiler
from engineworks.training.systems.paco.config import LossConfig, PartsConfig
from engineworks.training.systems.paco.loss import PartLoss
from engineworks.training.systems.paco.model import (
    Paco,
    PacoTraining,
    PartSampler,
    PeakMemory,
    part_saliency,
    sample_weights,
)

pytestmark = pytest.mark.train


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class Conv(nn.Module):
    """A backbone of one layer that counts its passes."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 4, stride=4)
        self.passes: list[int] = []

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        self.passes.append(len(images_BCHW))
        return [self.conv(images_BCHW)]


def training(
    *, num_pictures: int = 0, loss: LossConfig | None = None, **parts: int
) -> PacoTraining:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PacoTraining(
            Paco(Conv(), 6, num_classes=3),
            PartsConfig(**{"num": 3, "width": 5, **parts}),
            loss or LossConfig(),
            num_classes=3,
            num_pictures=num_pictures,
        )


VIEWS = draw(2, 4, 3, 28, 24, seed=0).float()
LABELS = torch.tensor([0, 1, 2, 1])


# --- the definition, cell by cell ----------------------------------------------------------------


def saliency_of(map_CHW: Tensor) -> Tensor:
    channels, height, width = map_CHW.shape
    attention = map_CHW.mean((1, 2)).exp()
    attention = attention / attention.sum()
    means = map_CHW.mean(0).exp()
    place = means / means.sum()
    result = torch.zeros(height, width, dtype=map_CHW.dtype)
    for row in range(height):
        for column in range(width):
            mixed = sum(attention[c] * map_CHW[c, row, column] for c in range(channels))
            result[row, column] = mixed * place[row, column]
    return result


def peaks_of(saliency_HW: Tensor, num: int, radius: int) -> list[list[int]]:
    height, width = saliency_HW.shape
    covered = np.zeros((height, width), int)
    peaks: list[list[int]] = []
    for _ in range(num):
        free = np.argwhere(covered == covered.min()).tolist()
        row, column = max(free, key=lambda cell: float(saliency_HW[cell[0], cell[1]]))
        peaks.append([row, column])
        covered[
            max(0, row - radius) : row + radius + 1, max(0, column - radius) : column + radius + 1
        ] += 1
    return peaks


def window_mean(map_CHW: Tensor, peak: list[int], window: int) -> Tensor:
    row, column, half = *peak, window // 2
    rows = slice(max(0, row - half), row + half + 1)
    return map_CHW[:, rows, max(0, column - half) : column + half + 1].mean((1, 2))


class TestPartSampler:
    @settings(deadline=None, max_examples=40)
    @given(
        height=st.integers(1, 6),
        width=st.integers(1, 6),
        num=st.integers(1, 6),
        window=st.sampled_from([1, 3, 5]),
        radius=st.integers(0, 2),
        seed=st.integers(0, 999),
    )
    def test_is_the_definition_cell_by_cell(
        self, height: int, width: int, num: int, window: int, radius: int, seed: int
    ) -> None:
        maps = draw(2, 4, height, width, seed=seed)
        sampler = PartSampler(num, window, radius)
        peaks = sampler.peaks(maps)
        parts = sampler.parts(maps, sampler.windows(peaks, maps))
        for b in range(2):
            saliency = saliency_of(maps[b])
            # float64
            torch.testing.assert_close(sampler.saliency(maps)[b], saliency, rtol=1e-12, atol=1e-15)
            want = peaks_of(saliency, num, radius)
            assert peaks[b].tolist() == want
            means = torch.stack([window_mean(maps[b], peak, window) for peak in want])
            torch.testing.assert_close(parts[b], means, rtol=1e-12, atol=1e-12)

    def test_keeps_peaks_apart_while_there_is_room(self) -> None:
        peaks = PartSampler(4, 3, radius=1).peaks(draw(8, 5, 7, 7, seed=1))
        distances = (peaks[:, :, None] - peaks[:, None]).abs().amax(-1)
        assert (distances[:, ~torch.eye(4, dtype=torch.bool)] >= 2).all()

    def test_of_equal_cells_takes_the_first_in_reading_order(self) -> None:
        peaks = PartSampler(4, 3, radius=1).peaks(torch.ones(1, 2, 3, 4))
        # then no cell is free: of those that one peak covers, again the first
        assert peaks.tolist() == [[[0, 0], [0, 2], [2, 0], [2, 2]]]
        assert PartSampler(6, 1, radius=0).peaks(torch.ones(1, 2, 2, 2)).tolist() == [
            [[0, 0], [0, 1], [1, 0], [1, 1], [0, 0], [0, 1]]
        ]

    def test_leaves_the_map_as_it_was(self) -> None:
        maps = draw(2, 4, 5, 5, seed=0)
        before = maps.clone()
        PartSampler(4, 3, 1).peaks(maps)
        assert torch.equal(maps, before)

    def test_gives_the_gradient_to_the_cells_of_the_windows_alone(self) -> None:
        maps = draw(1, 2, 7, 7, seed=0).requires_grad_()
        sampler = PartSampler(1, 3, 1)
        windows = sampler.windows(sampler.peaks(maps), maps)
        (gradient,) = torch.autograd.grad(sampler.parts(maps, windows).sum(), maps)
        assert torch.equal(gradient[0, 0].flatten(), windows[0, 0])
        assert gradient[0, 0].sum() == pytest.approx(1)

    def test_takes_maps_of_half_precision_and_channels_last(self) -> None:
        maps = draw(2, 16, 7, 7, seed=0).bfloat16()
        sampler = PartSampler(4, 3, 1)
        assert torch.equal(sampler.peaks(maps), sampler.peaks(maps.double()))
        windows = sampler.windows(sampler.peaks(maps), maps)
        parts = sampler.parts(maps, windows)
        assert (windows.dtype, parts.dtype) == (torch.float32, torch.bfloat16)
        last = maps.contiguous(memory_format=torch.channels_last)
        # bfloat16: 1/9 as a weight, sums in another order
        torch.testing.assert_close(sampler.parts(last, windows), parts, rtol=0.01, atol=0.01)

    @pytest.mark.data
    @pytest.mark.parametrize("name", ["7x7", "14x14", "14x14_nms0.2_k6_r3"])
    def test_finds_the_published_parts(self, shared: Path, name: str) -> None:
        with np.load(shared / "fixtures" / f"paco_parts_{name}.npz") as file:
            maps, want_parts, want_peaks = (
                torch.from_numpy(file[key]) for key in ("feat", "Z", "peaks")
            )
            radius = int(float(file["nms_threshold"]) * maps.shape[2])
            sampler = PartSampler(int(file["K"]), int(file["r"]), radius)
        peaks = sampler.peaks(maps)
        assert torch.equal(peaks, want_peaks)
        parts = sampler.parts(maps, sampler.windows(peaks, maps))
        torch.testing.assert_close(parts, want_parts, rtol=1e-5, atol=1e-6)  # float32


class TestSaliencyOfASample:
    @pytest.mark.data
    def test_gives_the_published_weighted_cross_entropy(self, shared: Path) -> None:
        with np.load(shared / "fixtures/paco_weighted_ce.npz") as file:
            given_ = {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}
        maps = given_["saliency"][:, None]  # a map of one channel, which is its own length
        weights = part_saliency(maps, PartSampler(4, 5, 0).windows(given_["peaks"], maps))
        ce = F.cross_entropy(given_["logits"], given_["targets"])
        share = float(given_["gamma"])
        want = (1 - share) * ce + share * weights.mean() * ce
        torch.testing.assert_close(want, given_["loss"], rtol=1e-6, atol=0)  # float32

    def test_has_mean_1_and_no_gradient(self) -> None:
        maps = draw(6, 5, 4, 4, seed=0).requires_grad_()
        sampler = PartSampler(2, 3, 1)
        weights = sample_weights(maps, sampler.windows(sampler.peaks(maps), maps), num_views=2)
        assert weights.shape == (3,)
        assert not weights.requires_grad
        assert float(weights.mean()) == pytest.approx(1)
        scaled = sample_weights(10 * maps, sampler.windows(sampler.peaks(maps), maps), num_views=2)
        torch.testing.assert_close(weights, scaled)  # shrinking all features gains nothing

    def test_of_nothing_is_1(self) -> None:
        maps = torch.zeros(4, 5, 4, 4)
        sampler = PartSampler(2, 3, 1)
        weights = sample_weights(maps, sampler.windows(sampler.peaks(maps), maps), num_views=2)
        assert weights.tolist() == [1, 1]


class TestPaco:
    def test_is_a_linear_classifier_of_the_mean_of_the_map(self) -> None:
        net = Paco(Conv(), 6, num_classes=3)
        logits, embedding = net(VIEWS[0])
        assert (logits.shape, embedding.shape) == ((4, 3), (4, 6))
        maps = net.features(VIEWS[0])
        torch.testing.assert_close(embedding, maps.flatten(2).mean(2))  # float32
        torch.testing.assert_close(logits, net.classifier(net.pool(maps)))


class TestTrainingStep:
    def test_puts_both_views_through_the_backbone_at_once(self) -> None:
        model = training()
        backbone: Any = model.net.backbone
        model(VIEWS, LABELS)
        assert backbone.passes == [8]

    @pytest.mark.parametrize("saliency", [0.0, 0.4])
    def test_is_the_sum_of_its_pieces(self, saliency: float) -> None:
        config = LossConfig(saliency=saliency, label_smoothing=0.1)
        model = training(loss=config)
        got = model(VIEWS, LABELS, ramp=0.5, epoch=9)

        fresh, sampler = training(loss=config), PartSampler(3, 3, 1)
        maps = [fresh.net.features(view) for view in VIEWS]
        logits = fresh.net.classifier((fresh.net.pool(maps[0]) + fresh.net.pool(maps[1])) / 2)
        windows = [sampler.windows(sampler.peaks(m), m) for m in maps]
        assert fresh.reduction is not None
        parts = torch.stack(
            [fresh.reduction(sampler.parts(m, w)) for m, w in zip(maps, windows, strict=True)]
        )
        terms = PartLoss(config, 3, 5)(parts, LABELS, epoch=9)
        each = F.cross_entropy(logits, LABELS, reduction="none", label_smoothing=0.1)
        saliencies = [part_saliency(m, w) for m, w in zip(maps, windows, strict=True)]
        weights = (saliencies[0] + saliencies[1]) / (saliencies[0] + saliencies[1]).mean()
        ce = ((1 - saliency) * each + saliency * weights * each).mean()
        want = {
            "loss": ce + 0.5 * (config.pac * terms["pac"] + config.soc * terms["soc"]),
            "ce": ce,
            "accuracy": (logits.argmax(1) == LABELS).float().mean(),
            **terms,
        }
        assert set(got) == set(want)
        for name, value in want.items():  # float32, batches of another size
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)

    def test_gives_every_parameter_a_gradient(self) -> None:
        for ramp in (1.0, 0.0):
            model = training()
            model(VIEWS, LABELS, ramp=ramp)["loss"].backward()
            assert all(p.grad is not None for p in model.parameters())
            assert model.reduction is not None
            assert model.reduction.weight.grad is not None
            assert model.reduction.weight.grad.any() == (ramp > 0)

    @pytest.mark.parametrize(
        ("loss", "ramp"), [(LossConfig(), 0.0), (LossConfig(pac=0.0, soc=0.0), 1.0)]
    )
    def test_without_contrast_computes_no_parts(self, loss: LossConfig, ramp: float) -> None:
        model = training(loss=loss)
        with Profiler() as profiler:
            got = model(VIEWS, LABELS, ramp=ramp)
        assert set(profiler.seconds) == {"other", "backbone"}
        assert got["loss"] == got["ce"]
        assert got["pac"] == got["soc"] == got["active"] == 0

    def test_without_contrast_has_nothing_to_learn_beyond_the_net(self) -> None:
        model = training(loss=LossConfig(pac=0.0, soc=0.0))
        assert {name.split(".")[0] for name in model.state_dict()} == {"net"}

    def test_times_its_sections(self) -> None:
        with Profiler() as profiler:
            training()(VIEWS, LABELS, epoch=9)
        names = {"backbone", "sampling", "covariance", "matching", "pac", "soc"}
        assert set(profiler.seconds) == {"other", *names}

    def test_goes_on_from_its_state(self) -> None:
        first, second = training(), training()
        first(VIEWS, LABELS)
        second.load_state_dict(first.state_dict())
        assert first(VIEWS, LABELS) == second(VIEWS, LABELS)

    def test_runs_in_half_precision(self) -> None:
        model, exact = training(), training()
        with torch.autocast("cpu", torch.bfloat16):
            got = model(VIEWS, LABELS)
        assert got["pac"].dtype == got["soc"].dtype == torch.float32
        # bfloat16 has three digits
        assert float(got["loss"].detach()) == pytest.approx(
            float(exact(VIEWS, LABELS)["loss"].detach()), rel=0.1
        )

    def test_shows_where_it_looks(self) -> None:
        model = training()
        peaks, grid = model.peaks(VIEWS[0])
        assert (peaks.shape, grid) == ((4, 3, 2), (7, 6))
        assert torch.equal(peaks, model.sampler.peaks(model.net.features(VIEWS[0])))


IDENTITY = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


class TestRememberedPeaks:
    def test_are_searched_again_every_so_many_visits(self) -> None:
        memory = PeakMemory(5, 2, refresh=3)
        affine, index = IDENTITY.expand(2, 2, 2, 3), torch.tensor([3, 1])
        peaks = torch.tensor([[[0, 0], [1, 2]], [[2, 1], [0, 2]]])
        searched = []
        for _ in range(7):
            found = memory.recall(index, affine, (3, 4))
            searched.append(found is None)
            if found is None:
                memory.store(index, affine[0], peaks, (3, 4))
            else:
                assert torch.equal(found, torch.cat([peaks, peaks]))
        assert searched == [True, False, False, True, False, False, True]

    def test_are_searched_for_all_where_one_picture_is_new(self) -> None:
        memory = PeakMemory(5, 2, refresh=3)
        affine = IDENTITY.expand(2, 2, 2, 3)
        memory.store(torch.tensor([0, 1]), affine[0], torch.zeros(2, 2, 2).long(), (3, 4))
        assert memory.recall(torch.tensor([1, 0]), affine, (3, 4)) is not None
        assert memory.recall(torch.tensor([1, 2]), affine, (3, 4)) is None

    @settings(deadline=None, max_examples=40)
    @given(
        left=st.floats(0, 0.4), top=st.floats(0, 0.4), side=st.floats(0.5, 1.0),
        flip=st.booleans(), seed=st.integers(0, 99),
    )  # fmt: skip
    def test_move_with_the_crop(
        self, left: float, top: float, side: float, flip: bool, seed: int
    ) -> None:
        grid = (6, 5)
        # view (x, y) of a crop at (left, top) of that side, maybe mirrored
        crop = torch.tensor([[1 / side, 0, -left / side], [0, 1 / side, -top / side]])
        if flip:
            crop[0] = torch.tensor([0.0, 0.0, 1.0]) - crop[0]
        affine = torch.stack([crop, IDENTITY])[:, None]
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(0, 6, (1, 4, 1), generator=generator)
        peaks = torch.cat([rows, torch.randint(0, 5, (1, 4, 1), generator=generator)], 2)
        memory = PeakMemory(1, 4, refresh=2)
        index = torch.zeros(1, dtype=torch.long)
        memory.store(index, affine[0], peaks, grid)
        found = memory.recall(index, affine, grid)
        assert found is not None
        assert torch.equal(found[:1], peaks)  # the view that they came from
        for (row, column), cell in zip(peaks[0].tolist(), found[1].tolist(), strict=True):
            x, y = (column + 0.5) / 5, (row + 0.5) / 6
            x = (1 - x if flip else x) * side + left
            y = y * side + top
            for place, got, cells in ((y, cell[0], 6), (x, cell[1], 5)):
                want = min(max(place * cells, 0.0), cells - 1e-3)
                # the cell, or its neighbour where float32 rounds across the border
                assert got - 1e-3 <= want <= got + 1 + 1e-3

    def test_outside_a_view_stay_at_its_border(self) -> None:
        memory = PeakMemory(1, 2, refresh=2)
        index = torch.zeros(1, dtype=torch.long)
        memory.store(index, IDENTITY[None], torch.tensor([[[0, 0], [6, 6]]]), (7, 7))
        centre = torch.tensor([[2.0, 0.0, -0.5], [0.0, 2.0, -0.5]])
        found = memory.recall(index, centre.expand(2, 1, 2, 3), (7, 7))
        assert found is not None
        assert found.tolist() == [[[0, 0], [6, 6]]] * 2

    def test_are_used_in_training_and_survive_a_restart(self) -> None:
        model = training(refresh=2, num_pictures=9)
        kwargs: dict[str, Any] = {
            "index_B": torch.tensor([8, 0, 3, 4]),
            "affine_VB23": IDENTITY.expand(2, 4, 2, 3),
        }
        model(VIEWS, LABELS, **kwargs)
        again = training(refresh=2, num_pictures=9)
        again.load_state_dict(model.state_dict())
        same = VIEWS[:1].expand(2, -1, -1, -1, -1)
        plain = training()
        assert plain.criterion is not None
        assert model.criterion is not None
        plain.criterion.load_state_dict(model.criterion.state_dict())
        # view 1 of the first batch, whose peaks were kept, is both views now
        want = plain(same, LABELS)
        for found in (model(same, LABELS, **kwargs), again(same, LABELS, **kwargs)):
            torch.testing.assert_close(found["loss"], want["loss"])
        assert model.memory is not None
        assert model.memory.visits_N.tolist() == [2, 2, 2, 2, 2, 2, 2, 2, 2]

    def test_need_to_know_the_pictures(self) -> None:
        with pytest.raises(InputError, match=r"parts\.refresh"):
            training(refresh=2, num_pictures=4)(VIEWS, LABELS)

    def test_take_no_room_where_they_are_not_wanted(self) -> None:
        assert not [name for name in training().state_dict() if name.startswith("memory")]
