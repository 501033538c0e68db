from __future__ import annotations

import pytest
import torch

from engineworks.training.systems.refdet.backbone import Backbone, channels
from engineworks.training.systems.refdet.config import STRIDE, DetectorConfig

pytestmark = pytest.mark.train

SCALES = [(2, 3), (2, 3, 4), (2, 3, 4, 5), (3,), (3, 4), (3, 4, 5), (4,), (4, 5), (5,)]


def frames(num: int = 2, height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.randn(num, 3, height, width, generator=torch.Generator().manual_seed(0))


class TestThePyramid:
    @pytest.mark.parametrize("scales", SCALES)
    def test_has_a_map_per_scale_and_nothing_that_no_scale_needs(
        self, scales: tuple[int, ...]
    ) -> None:
        net = Backbone(scales, width=0.125, depth=0.33)

        maps = net(frames())

        assert [m.shape[2:] for m in maps] == [(64 >> s, 96 >> s) for s in scales]
        assert tuple(m.shape[1] for m in maps) == net.channels == channels(scales, 0.125)
        torch.stack([m.square().mean() for m in maps]).sum().backward()
        assert [name for name, p in net.named_parameters() if p.grad is None] == []

    def test_has_the_size_of_the_published_net(self) -> None:
        net = Backbone((2, 3, 4, 5))
        # YOLOv8n has 3,157,200 parameters, 897,664 of them in its head
        assert sum(p.numel() for p in net.parameters()) == 3_157_200 - 897_664
        assert net.channels == (32, 64, 128, 256)

    def test_grows_with_width_and_depth(self) -> None:
        sizes = [
            sum(p.numel() for p in Backbone((3, 4, 5), width=width, depth=depth).parameters())
            for width, depth in ((0.125, 0.33), (0.25, 0.33), (0.25, 0.66))
        ]
        assert sizes == sorted(sizes)

    def test_of_a_frame_does_not_depend_on_the_others(self) -> None:
        net = Backbone((3, 4), width=0.125).eval()
        both = frames()
        with torch.no_grad():
            for together, alone in zip(net(both), net(both[1:]), strict=True):
                # float32 kernels for another batch size
                torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)

    def test_is_finest_of_all_where_the_backbone_gives_it(self) -> None:
        """What scale 2 adds costs nothing: the map is there in any case."""
        sizes = {
            scales: sum(p.numel() for p in Backbone(scales).parameters())
            for scales in ((2, 3, 4, 5), (3, 4, 5))
        }
        assert len(set(sizes.values())) == 1


class TestWhatTheConfigurationMayAskFor:
    def test_checkpointing_changes_no_number(self) -> None:
        results = []
        for checkpointing in (False, True):
            torch.manual_seed(0)
            net = Backbone((3, 4), width=0.125, checkpointing=checkpointing)
            net(frames())[0].square().mean().backward()
            results.append([p.grad for p in net.parameters()])
        for got, want in zip(*results, strict=True):
            if want is None:  # of what only scale 4 needs
                assert got is None
            else:
                assert got is not None
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)  # sums anew

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"scales": (3, 5)}, "without a gap"),
            ({"scales": (4, 3)}, "without a gap"),
            ({"scales": (2,)}, "add scale 3"),
            ({"scales": (3, 4), "widths": (8,)}, "widths must have one value per scale"),
            ({"scales": (3, 4), "outputs": (8, 8, 8)}, "outputs must have one value per scale"),
        ],
    )
    def test_is_checked(self, wrong: dict[str, tuple[int, ...]], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            DetectorConfig(**wrong)

    def test_the_stride_is_that_of_the_coarsest_stage(self) -> None:
        (coarsest,) = Backbone((5,), width=0.125)(frames(2, 2 * STRIDE, STRIDE))
        assert coarsest.shape[2:] == (2, 1)
