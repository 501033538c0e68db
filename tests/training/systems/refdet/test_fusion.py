from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from engineworks.training.systems.refdet.fusion import FUSIONS, Cheaf, LinearAttention, Psalm

pytestmark = pytest.mark.train

CHANNELS, WIDTHS, OUTPUTS = (16, 32), (8, 12), (16, 24)
GRID = ((6, 8), (3, 4))

seeds = st.integers(0, 10_000)


def maps(num: int = 2, *, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(num, c, *grid, generator=generator)
        for c, grid in zip(CHANNELS, GRID, strict=True)
    ]


def prototypes(num: int, *, seed: int = 0) -> Tensor:
    return torch.randn(num, sum(WIDTHS), generator=torch.Generator().manual_seed(seed))


def fusion(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = FUSIONS[name](CHANNELS, WIDTHS, OUTPUTS)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # or else their place would make no difference
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


@torch.no_grad()
def fuse(net: nn.Module, *args: object) -> list[Tensor]:
    found: list[Tensor] = net(*args)
    return found


def convolved(x_CHW: np.ndarray, conv: nn.Conv2d) -> np.ndarray:
    """A convolution of stride 1, plainly."""
    weight, bias = (p.detach().double().numpy() for p in (conv.weight, conv.bias))
    kernel, groups = weight.shape[2], conv.groups
    padded = np.pad(x_CHW, ((0, 0), (kernel // 2,) * 2, (kernel // 2,) * 2))
    height, width = x_CHW.shape[1:]
    per_group_in, per_group_out = len(x_CHW) // groups, len(weight) // groups
    out = np.empty((len(weight), height, width))
    for o in range(len(weight)):
        first = o // per_group_out * per_group_in
        for y in range(height):
            for x in range(width):
                patch = padded[first : first + per_group_in, y : y + kernel, x : x + kernel]
                out[o, y, x] = (patch * weight[o]).sum() + bias[o]
    return out


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return np.asarray(e / e.sum(axis, keepdims=True))


class TestLinearAttention:
    @pytest.mark.parametrize("local", [True, False])
    def test_is_what_a_plain_loop_over_heads_finds(self, local: bool) -> None:
        torch.manual_seed(0)
        net = LinearAttention(32, local=local)
        x, gates = torch.randn(2, 32, 4, 5), torch.rand(2, 16)

        with torch.no_grad():
            found = net(x, gates).numpy()

        for b in range(2):
            x_CHW = x[b].double().numpy()
            before = [x_CHW, x_CHW]
            if local:
                for i, module in enumerate((net.before_queries, net.before_keys)):
                    short, _, long = module
                    y = convolved(x_CHW, short)
                    before[i] = convolved(y / (1 + np.exp(-y)), long)
            queries, keys, values = (
                convolved(y, conv).reshape(2, 8, 20)
                for y, conv in zip(
                    (*before, x_CHW), (net.queries, net.keys, net.values), strict=True
                )
            )
            rows = []
            for head in range(2):
                context = np.zeros((8, 8))
                for place in range(20):
                    shares = softmax(keys[head], 1)[:, place]
                    context += np.outer(shares, values[head][:, place])
                rows.append(context.T @ softmax(queries[head], 0))
            weighed = np.concatenate(rows) * gates[b].double().numpy()[:, None]
            want = convolved(weighed.reshape(16, 4, 5), net.out)
            # float32 sums over some dozens of terms
            np.testing.assert_allclose(found[b], want, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(("width", "heads"), [(8, 1), (32, 2), (64, 4), (128, 4), (256, 4)])
    def test_has_a_head_per_sixteen_channels_and_four_at_most(self, width: int, heads: int) -> None:
        assert LinearAttention(width, local=False).heads == heads

    def test_costs_twice_as_much_for_a_map_of_twice_the_size(self) -> None:
        net, operations = LinearAttention(32, local=False), []
        for height in (8, 16):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                net(torch.randn(1, 32, height, 16))
            operations.append(counter.get_total_flops())
        assert operations[1] == 2 * operations[0]


class TestThePrompt:
    @given(seed=seeds, num=st.integers(1, 5))
    @settings(max_examples=10, deadline=None)
    def test_weighs_by_the_mean_over_what_is_looked_for(self, seed: int, num: int) -> None:
        net = fusion("psalm")
        rows = prototypes(num, seed=seed)
        order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
        want = fuse(net, maps(), rows)
        for again in (rows[order], rows.repeat(2, 1)):
            for got, expected in zip(fuse(net, maps(), again), want, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)  # another sum

    @given(seed=seeds)
    @settings(max_examples=10, deadline=None)
    def test_may_be_another_for_each_frame(self, seed: int) -> None:
        """A frame whose prompt is a part of the prototypes is like one that has no others."""
        net, rows = fusion("psalm"), prototypes(4, seed=seed)
        prompted = torch.tensor([[True, False, True, False], [False, False, False, True]])

        together = fuse(net, maps(seed=seed), rows, prompted)

        for b in range(2):
            alone = fuse(net, [m[b : b + 1] for m in maps(seed=seed)], rows[prompted[b]])
            for got, want in zip(together, alone, strict=True):
                # float32 kernels for another batch size
                torch.testing.assert_close(got[b : b + 1], want, rtol=1e-4, atol=1e-5)

    def test_matters(self) -> None:
        net = fusion("psalm")
        found = [fuse(net, maps(), prototypes(1, seed=seed)) for seed in (0, 1)]
        assert not any(torch.allclose(a, b) for a, b in zip(*found, strict=True))

    def test_costs_no_convolution_per_prototype(self) -> None:
        operations = []
        for num in (1, 2, 3):
            with FlopCounterMode(display=False) as counter:
                fuse(fusion("psalm"), maps(1), prototypes(num))
            operations.append(counter.get_total_flops())
        # only the linear layer of the gates, one multiplication and addition per weight
        gates = sum(2 * w * (c // 2) for c, w in zip(CHANNELS, WIDTHS, strict=True))
        assert np.diff(operations).tolist() == [gates, gates]


@pytest.mark.parametrize("name", sorted(FUSIONS))
class TestAnyFusion:
    def test_keeps_sizes_and_gives_the_channels_asked_for(self, name: str) -> None:
        found = fuse(fusion(name), maps(), prototypes(3))
        assert [tuple(m.shape) for m in found] == [
            (2, out, *grid) for out, grid in zip(OUTPUTS, GRID, strict=True)
        ]

    @pytest.mark.parametrize("scales", [1, 2])
    def test_learns_in_every_parameter(self, name: str, scales: int) -> None:
        net = FUSIONS[name](CHANNELS[:scales], WIDTHS[:scales], (24, 16)[:scales])
        rows = prototypes(2)[:, : sum(WIDTHS[:scales])]
        found = net(maps()[:scales], rows, torch.tensor([[True, False], [True, True]]))
        torch.stack([m.square().mean() for m in found]).sum().backward()
        assert [key for key, p in net.named_parameters() if p.grad is None] == []

    def test_takes_half_precision(self, name: str) -> None:
        net = fusion(name)
        with torch.autocast("cpu", torch.bfloat16):
            found = fuse(net, maps(), prototypes(2))
        for got, want in zip(found, fuse(net, maps(), prototypes(2)), strict=True):
            assert (got - want).abs().max() < 0.1 * want.abs().max()  # 8 bits, several layers


@pytest.mark.parametrize(
    # the published numbers of parameters, at the published widths
    ("kind", "parameters"),
    [(Psalm, 776_160), (Cheaf, 1_763_594)],
)
def test_the_published_size(kind: type[nn.Module], parameters: int) -> None:
    net = kind((32, 64, 128, 256), (32, 64, 128, 256), (128, 256, 512, 512))
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.data
class TestThePublishedModules:
    """Outputs of the published modules with the weights that they were computed with."""

    CHANNELS = (16, 16, 32, 32)

    def load(self, shared: Path, name: str) -> dict[str, Tensor]:
        with np.load(shared / f"fixtures/refdet_{name}.npz") as file:
            return {key: torch.from_numpy(np.array(file[key])) for key in file.files}

    @pytest.mark.parametrize(
        ("name", "kind", "outputs"),
        [
            ("psalm_small", Psalm, (16, 24, 32, 32)),
            ("cheaf_small", Cheaf, (16, 32, 32, 32)),
        ],
    )
    def test_give_the_same(
        self, shared: Path, name: str, kind: type[nn.Module], outputs: tuple[int, ...]
    ) -> None:
        values = self.load(shared, name)
        net = kind(self.CHANNELS, self.CHANNELS, outputs).eval()
        net.load_state_dict(renamed(values))
        seen = [values[f"in_p{scale}"] for scale in range(2, 6)]
        rows = torch.cat([values[f"sup_p{scale}"] for scale in range(2, 6)], 1)

        found = fuse(net, seen, rows, torch.eye(2, dtype=torch.bool))  # each frame has its own

        for scale, got in enumerate(found, 2):
            # float32 sums in another order
            torch.testing.assert_close(got, values[f"out_p{scale}"], rtol=0, atol=2e-6)
        for i, x in enumerate(seen):
            with torch.no_grad():
                bypass = net.refine[i](x) + net.around[i](x)
            torch.testing.assert_close(bypass, values[f"bypass_p{i + 2}"], rtol=0, atol=2e-6)

    def test_attend_the_same(self, shared: Path) -> None:
        values = self.load(shared, "psalm_attention")
        names = renamed(values)
        gate = {
            key: names.pop(f"support_modulator.{key}")
            for key in ("0.weight", "0.bias", "1.weight", "1.bias")
        }
        net = LinearAttention(32, local=True)
        net.load_state_dict(names)
        assert net.heads == values["heads"]
        linear = values["proto"].double() @ gate["0.weight"].double().T + gate["0.bias"]
        centred = linear - linear.mean(1, keepdim=True)
        normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        gates = (normed * gate["1.weight"] + gate["1.bias"]).sigmoid().float()
        with torch.no_grad():
            found = net(values["x"], gates)
        torch.testing.assert_close(found, values["out"], rtol=0, atol=2e-6)  # float32 sums

    def test_have_maps_of_these_sizes(self, shared: Path) -> None:
        values = self.load(shared, "fusion_shapes")
        channels = (32, 64, 128, 256)
        seen = [torch.zeros(1, c, 64 >> i, 64 >> i) for i, c in enumerate(channels)]
        for name, kind in (("psalm", Psalm), ("cheaf", Cheaf)):
            wanted = [values[f"{name}_p{scale}"].tolist() for scale in range(2, 6)]
            net = kind(channels, channels, tuple(shape[1] for shape in wanted)).eval()
            found = fuse(net, seen, torch.zeros(1, sum(channels)))
            assert sum(p.numel() for p in net.parameters()) == values[f"{name}_params"]
            # the published frames are 640 pixels wide, these are 256
            assert [[*m.shape[:2], m.shape[2] * 5 // 2, m.shape[3] * 5 // 2] for m in found] == (
                wanted
            )
            heads = [attention.heads for attention in net.attentions]
            assert heads == values["heads"].tolist()


_NAMES = (
    (r"(pyramid|pyramid_refinement)\.td_convs\.(\d)\.0\.", r"top_down.\2."),
    (r"(pyramid|pyramid_refinement)\.bu_convs\.", "bottom_up."),
    (r"pyramid\.fusions\.", "smooth."),
    (r"pyramid_refinement\.fusion_convs\.", "smooth."),
    (r"pyramid_refinement\.gates\.(\d)\.channel_gate\.", r"emphasis.\1.channels."),
    (r"pyramid_refinement\.gates\.(\d)\.spatial_gate\.", r"emphasis.\1.places."),
    (r"attentions\.p(\d)\.support_modulator\.", r"gates.p\1."),
    (r"^efficient_attentions\.", "attentions."),
    (r"^short_long_convs\.p(\d)\.short_conv\.", r"convolutions.p\1.0."),
    (r"^short_long_convs\.p(\d)\.long_conv\.", r"convolutions.p\1.2."),
    (r"^branch_fusion\.", "join."),
    (r"q_preprocessor\.short_conv\.", "before_queries.0."),
    (r"q_preprocessor\.long_conv\.", "before_queries.2."),
    (r"k_preprocessor\.short_conv\.", "before_keys.0."),
    (r"k_preprocessor\.long_conv\.", "before_keys.2."),
    (r"\breprojection\.", "out."),
    (r"^(refinement|output)_projectors\.", "refine."),
    (r"^residual_projectors\.", "around."),
    (r"\.p(\d)\.", lambda found: f".{int(found[1]) - 2}."),
)


def renamed(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published weights under the names that they have here."""
    weights = {}
    for key, value in values.items():
        if key.startswith("w:"):
            name = key.removeprefix("w:")
            for pattern, here in _NAMES:
                name = re.sub(pattern, here, name)
            weights[name] = value
    return weights
