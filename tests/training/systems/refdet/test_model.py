from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engineworks.runtime import references
from engineworks.runtime.errors import ConfigError
from engineworks.training.systems.refdet.config import DetectorConfig, EncoderConfig
from engineworks.training.systems.refdet.model import (
    Detect,
    Detector,
    Encode,
    RefDet,
    average,
    prototype_widths,
)

pytestmark = pytest.mark.train

SMALL = DetectorConfig(width=0.125, scales=(3, 4), reg_max=4)
CNN: dict[str, Any] = {"name": "test_resnet", "weights": "none"}
VIT: dict[str, Any] = {"name": "test_vit", "weights": "none"}

seeds = st.integers(0, 10_000)


def model(
    detector: DetectorConfig = SMALL,
    num_base: int = 0,
    size: tuple[int, int] | None = (64, 64),
    **encoder: Any,
) -> RefDet:
    torch.manual_seed(0)
    config = EncoderConfig(**(CNN | encoder))
    return RefDet(config, detector, num_base, reference_size=size)


def images(num: int, height: int = 64, width: int = 64, *, seed: int = 0) -> Tensor:
    return torch.randn(num, 3, height, width, generator=torch.Generator().manual_seed(seed))


def prototypes(num: int, net: RefDet, *, seed: int = 0) -> Tensor:
    widths = list(net.detector.widths)
    rows = torch.randn(num, sum(widths), generator=torch.Generator().manual_seed(seed))
    return torch.cat([F.normalize(part, dim=1) for part in torch.split(rows, widths, 1)], 1)


def learns(net: torch.nn.Module) -> set[str]:
    return {name for name, p in net.named_parameters() if p.grad is not None}


class TestAPrototype:
    @pytest.mark.parametrize("encoder", [CNN, VIT], ids=["cnn", "vit"])
    def test_has_a_part_of_length_one_per_scale(self, encoder: dict[str, Any]) -> None:
        net = model(**encoder).eval()
        with torch.no_grad():
            rows = Encode(net)(images(3))
        assert rows.shape == (3, sum(net.detector.widths))
        for part in torch.split(rows, list(net.detector.widths), 1):
            torch.testing.assert_close(part.norm(dim=1), torch.ones(3))  # to float32

    @given(seed=seeds, counts=st.lists(st.integers(1, 4), min_size=1, max_size=4))
    @settings(max_examples=30, deadline=None)
    def test_is_the_average_that_is_computed_at_run_time(
        self, seed: int, counts: list[int]
    ) -> None:
        rng = np.random.default_rng(seed)
        whose = rng.permutation(np.repeat(np.arange(len(counts)), counts))
        rows = rng.normal(size=(len(whose), 7)).astype(np.float32)

        found = average(torch.from_numpy(rows), torch.from_numpy(whose), len(counts), (4, 3))

        for i, row in enumerate(found.numpy()):
            want = references.average(rows[whose == i], (4, 3))
            # float32; drawn rows may nearly cancel each other
            np.testing.assert_allclose(row, want, rtol=1e-4, atol=1e-5)

    def test_of_a_picture_does_not_depend_on_the_others(self) -> None:
        net = model(**VIT).eval()
        with torch.no_grad():
            both, alone = Encode(net)(images(2)), Encode(net)(images(2)[1:])
        torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)  # another batch size


class TestTheFeatures:
    def test_of_a_transformer_are_its_class_token_beside_the_mean_of_its_patches(self) -> None:
        net = model(**VIT).eval()
        whole = timm.create_model("test_vit", num_classes=0, img_size=64).eval()
        whole.load_state_dict(net.encoder.net.net.model.state_dict(), strict=False)

        with torch.no_grad():
            found = net.encoder.features(images(2))
            tokens = whole.forward_features(images(2)).double()

        first, mean = tokens[:, 0], tokens[:, 1:].mean(1)
        want = torch.cat([v / v.norm(dim=1, keepdim=True) for v in (first, mean)], 1)
        assert net.encoder.net.width == found.shape[1]
        # rounded once more by their lengths
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)

    def test_leave_out_registers(self) -> None:
        net = model(name="vit_pwee_patch16_reg1_gap_256").eval()  # one, and no class token
        with torch.no_grad():
            found = net.encoder.features(images(1))
            tokens = net.encoder.net.net.model.forward_features(images(1))
        torch.testing.assert_close(found, tokens[:, 1:].mean(1), rtol=1e-5, atol=1e-6)

    def test_of_a_convolutional_net_are_the_mean_of_its_last_map(self) -> None:
        net = model().eval()
        with torch.no_grad():
            found = net.encoder.features(images(2))
            (last,) = net.encoder.net.net(images(2))
        torch.testing.assert_close(found, last.mean((2, 3)))

    @pytest.mark.parametrize("size", [(64, 64), (96, 160)])
    def test_of_a_transformer_are_of_any_size_that_it_is_made_for(
        self, size: tuple[int, int]
    ) -> None:
        net = model(size=size, **VIT).eval()
        assert net.encoder.features(images(1, *size)).shape == (1, net.encoder.net.width)

    def test_are_compiled_without_other_names_for_the_weights(self) -> None:
        compiled, plain = model(compile=True), model()
        assert compiled.encoder.net._compiled_call_impl is not None
        assert compiled.state_dict().keys() == plain.state_dict().keys()


class TestWhatLearns:
    def step(self, net: RefDet) -> set[str]:
        """Names of the parameters that a detection's loss reaches, by way of the prototypes."""
        net.train()
        rows = net.encoder(net.encoder.features(images(3)))
        found = net.detector(images(2), net.prototypes(rows, torch.tensor([0, 1, 1]), 2))
        found.prototype.logits_BAC.sigmoid().square().sum().backward()
        return learns(net.encoder)

    def test_are_the_projections_alone_where_the_net_is_frozen(self) -> None:
        net = model()
        reached = self.step(net)
        assert net.encoder.frozen
        assert {name.partition(".")[0] for name in reached} == {"projections"}
        assert len(reached) == len(list(net.encoder.projections.parameters()))

    def test_are_the_last_blocks_and_what_follows_them(self) -> None:
        net = model(**VIT, train_blocks=2)
        num = len(net.encoder.net.net.model.blocks)
        reached = self.step(net)
        parts = {".".join(n.split(".")[3:5]) for n in reached if n.startswith("net.")}
        assert {part for part in parts if part.startswith("blocks")} == {
            f"blocks.{num - 2}",
            f"blocks.{num - 1}",
        }
        assert any(part.startswith("norm.") for part in parts)
        assert not any(part.startswith(("patch_embed", "cls_token")) for part in parts)

    @pytest.mark.parametrize("encoder", [CNN, VIT], ids=["cnn", "vit"])
    def test_may_be_all(self, encoder: dict[str, Any]) -> None:
        net = model(**encoder, train_blocks="all")
        assert len(self.step(net)) == len(list(net.encoder.parameters()))

    def test_a_frozen_net_keeps_its_statistics_and_builds_no_graph(self) -> None:
        net = model().train()
        before = {name: value.clone() for name, value in net.encoder.net.state_dict().items()}
        features = net.encoder.features(images(3))
        assert not features.requires_grad
        for name, value in net.encoder.net.state_dict().items():
            assert torch.equal(value, before[name])

    def test_some_blocks_of_a_net_that_has_none_are_an_error(self) -> None:
        with pytest.raises(ConfigError, match="no blocks, of which the last 2") as caught:
            model(train_blocks=2)
        assert "0 or to all" in (caught.value.fix or "")


class TestTheDetector:
    def test_looks_in_each_frame_for_its_own_prompt(self) -> None:
        net = model().eval()
        rows = prototypes(3, net)
        prompted = torch.tensor([[True, False, True], [False, True, False]])
        with torch.no_grad():
            together = net.detector(images(2), rows, prompted).prototype.logits_BAC
            for b in range(2):
                alone = net.detector(images(2)[b : b + 1], rows[prompted[b]]).prototype
                # float32 kernels for another batch size
                torch.testing.assert_close(
                    together[b : b + 1][..., prompted[b]], alone.logits_BAC, rtol=1e-4, atol=1e-4
                )

    @pytest.mark.parametrize("num_base", [0, 3])
    def test_learns_in_every_parameter(self, num_base: int) -> None:
        net = model(num_base=num_base)
        found = net.detector(images(2), prototypes(2, net))
        branches = [found.prototype] if found.base is None else [found.prototype, found.base]
        loss = torch.stack([found.boxes(b).mean() + b.logits_BAC.mean() for b in branches]).sum()
        loss.backward()
        left = [name for name, p in net.detector.named_parameters() if p.grad is None]
        assert left == []

    def test_has_the_published_widths_by_default(self) -> None:
        assert prototype_widths(DetectorConfig(scales=(2, 3, 4, 5))) == (32, 64, 128, 256)
        assert prototype_widths(SMALL.model_copy(update={"widths": (5, 6)})) == (5, 6)


class TestTheCandidates:
    @pytest.mark.parametrize("num_base", [0, 3])
    @pytest.mark.parametrize("num", [10, 10_000])
    def test_are_the_best_anchors_with_their_best_class(self, num_base: int, num: int) -> None:
        net = model(num_base=num_base).eval()
        for name, p in net.named_parameters():
            if name.startswith("detector.head"):
                torch.nn.init.normal_(p, 0, 0.2)  # an untrained head finds all alike
        rows = prototypes(2, net)

        with torch.no_grad():
            boxes, scores, classes = Detect(net, num)(images(2), rows)
            raw = net.detector(images(2), rows)
            parts = [(raw.prototype.logits_BAC.numpy(), raw.boxes(raw.prototype).numpy(), num_base)]
            if raw.base is not None:
                parts.insert(0, (raw.base.logits_BAC.numpy(), raw.boxes(raw.base).numpy(), 0))

        for b in range(2):
            every = [
                (float(row.max()), first + int(row.argmax()), box.tolist())
                for logits, found, first in parts
                for row, box in zip(logits[b], found[b], strict=True)
            ]
            border = sorted((logit for logit, _, _ in every), reverse=True)[:num][-1]
            wanted = [one for one in every if one[0] >= border]
            assert classes[b].tolist() == [kind for _, kind, _ in wanted]
            # float32 sums in another order, of coordinates up to some 100 pixels
            np.testing.assert_allclose(boxes[b], [box for _, _, box in wanted], atol=1e-4)
            want = 1 / (1 + np.exp(-np.array([logit for logit, _, _ in wanted])))
            np.testing.assert_allclose(scores[b].numpy(), want, rtol=1e-5)  # float32
            if num_base:
                assert set(classes[b].tolist()) <= set(range(num_base + 2))

    def test_of_an_untrained_net_are_no_objects(self) -> None:
        """Nothing is above the usual border of 0.25 before something was learnt."""
        net = model(DetectorConfig(scales=(3, 4, 5))).eval()
        with torch.no_grad():
            _, scores, _ = Detect(net, 300)(images(2, 128, 128), prototypes(4, net))
        assert (scores > 0.25).float().mean() < 0.01


class TestTheParameters:
    def test_of_the_published_system_stay_within_their_budget(self) -> None:
        published = DetectorConfig(
            scales=(2, 3, 4, 5), outputs=(128, 256, 512, 512), separable=False
        )
        detector = sum(p.numel() for p in Detector(published, 80).parameters())
        encoder = 21_586_944  # ViT-S/16 with registers, as timm counts it
        projections = (2 * 384 + 3) * sum(prototype_widths(published))
        assert encoder + projections + detector < 50_000_000

    def test_are_told_by_part_and_add_up(self) -> None:
        net = model(num_base=3)
        table = net.parameter_table()
        names = [name for name, _, _ in table]
        assert names == [
            *("encoder", "projections", "backbone", "fusion"),
            *("head, prototype", "head, base", "all"),
        ]
        for column in (1, 2):
            *parts, everything = (int(row[column]) for row in table)
            assert sum(parts) == everything
        assert table[0] == ("encoder", table[0][1], 0)
