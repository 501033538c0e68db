"""Three planes to one logit per pixel: the graph ``segment`` of the bundle.

Every network takes raw sensor values and rescales them itself, so that there is one contract for
the value range and nobody can rescale twice. Height and width are free, as multiples of ``stride``.

* ``Plain``: a row of 3 x 3 convolutions on cells of 2 x 2 pixels, the last of which gives a logit
  for each pixel of its cell. Defects are a few pixels wide and their evidence lies around them, so
  there is nothing to pool; without branches of other scales there is nothing to upsample or to
  concatenate, and the whole net runs in INT8.
* ``UNet``: the published network, for comparison and for its weights. The names of its parts are
  those of its published state, which can be loaded as it is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engineworks.training.systems.stripe.config import NetworkConfig, TaskConfig

_FACTORS = (1, 2, 4, 8, 8, 8)  # widths of the published levels
_PRIOR = 0.01  # probability of a defect that an untrained net answers; keeps the first steps calm


class Segment(nn.Module):
    """Raw planes -> logits.

    Args:
        net: raw planes (B, 3, H, W) -> (B, 1, H, W).
        stride: heights and widths must be multiples of it.
        reach: pixels beyond which nothing changes a logit; None where there is no such border.
    """

    def __init__(self, net: nn.Module, *, stride: int, reach: int | None) -> None:
        super().__init__()
        self.net = net
        self.stride = stride
        self.reach = reach

    def forward(self, planes_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) float32 in the sensor's values -> (B, 1, H, W) float32 logits."""
        logits: Tensor = self.net(planes_BCHW)
        return logits


def build(config: TaskConfig) -> Segment:
    """The network of a configuration with random weights from torch's global generator."""
    network = config.network
    if network.name == "plain":
        reach = network.cell * (network.depth + 2)
        return Segment(Plain(network, config.value_range), stride=network.stride, reach=reach)
    unet = UNet(network.width, attentive=network.name == "unet-se")
    # no reach: its upsampling spreads from corner to corner, by another step for every size
    return Segment(_OneLogit(unet, config.value_range), stride=network.stride, reach=None)


class Plain(nn.Module):
    """Convolutions on cells of pixels.

    They see the target and its differences to the references: weights in 8 bits could not take
    one plane from another so exactly. The first one sees a cell and a pixel around it; ``depth``
    more follow, and the last gives cell x cell logits.
    """

    def __init__(self, config: NetworkConfig, value_range: tuple[float, float]) -> None:
        super().__init__()
        cell, width = config.cell, config.width
        self.cell = cell
        self.mix = _Mix(value_range)
        first = _conv_norm_relu(3, width, cell + 2, stride=cell, padding=1, bias=False)
        inner = [
            _conv_norm_relu(width, width, 3, padding=1, bias=False) for _ in range(config.depth)
        ]
        self.features = nn.Sequential(first, *inner)
        self.last = nn.Conv2d(width, cell * cell, 3, padding=1)
        nn.init.constant_(self.last.get_parameter("bias"), math.log(_PRIOR / (1 - _PRIOR)))

    def forward(self, planes_BCHW: Tensor) -> Tensor:
        cells: Tensor = self.last(self.features(self.mix(planes_BCHW)))
        return F.pixel_shuffle(cells, self.cell)


class _Mix(nn.Conv2d):
    """Target and its differences to both references, the sensor's range rescaled to -1 ... 1.

    One fixed convolution: engines that move quantizers through other operators leave it alone.
    """

    def __init__(self, value_range: tuple[float, float]) -> None:
        super().__init__(3, 3, 1)
        low, high = value_range
        unit = (high - low) / 2
        differences = torch.tensor([[1.0, 0, 0], [1, -1, 0], [1, 0, -1]]) / unit
        # about 0, because INT8 is symmetric and would leave half its steps unused otherwise
        middle = torch.tensor([-(low + high) / 2 / unit, 0, 0])
        self.load_state_dict({"weight": differences[:, :, None, None], "bias": middle})
        self.requires_grad_(False)

    def forward(self, planes_BCHW: Tensor) -> Tensor:
        """Always in float32: bfloat16 holds but 8 bits of a sensor's value."""
        device = planes_BCHW.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return super().forward(planes_BCHW)
        return super().forward(planes_BCHW)


def _conv_norm_relu(into: int, out: int, side: int, **settings: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(into, out, side, **settings), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
    )


class UNet(nn.Module):
    """Six levels of widths w, 2w, 4w, 8w, 8w, 8w, each half as large; two logits per pixel.

    Args:
        width: w (published: 64).
        attentive: the later state: pooled context at the bottom, attention over the channels
            where two levels meet, and one convolution there instead of two.
    """

    def __init__(self, width: int, *, attentive: bool = False) -> None:
        super().__init__()
        self.encoder = _Encoder(width, attentive)
        self.decoder = _Decoder(width, attentive)
        for module in self.modules():  # as published
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, planes_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 2, H, W) logits."""
        logits: Tensor = self.decoder(self.encoder(planes_BCHW))
        return logits


class _Encoder(nn.Module):
    def __init__(self, width: int, attentive: bool) -> None:
        super().__init__()
        into = 3
        for level, factor in enumerate(_FACTORS, start=1):
            self.add_module(f"block{level}", _convs(into, factor * width, 2))
            into = factor * width
        self.sppf = _PooledContext(into) if attentive else nn.Identity()

    def forward(self, planes_BCHW: Tensor) -> list[Tensor]:
        """Maps of all levels, finest first."""
        maps: list[Tensor] = []
        for level in range(1, len(_FACTORS) + 1):
            coarser = F.max_pool2d(maps[-1], 2) if maps else planes_BCHW
            maps.append(self.get_submodule(f"block{level}")(coarser))
        maps[-1] = self.sppf(maps[-1])
        return maps


class _Decoder(nn.Module):
    names = ("_b", "1", "2", "3", "4")

    def __init__(self, width: int, attentive: bool) -> None:
        super().__init__()
        into = _FACTORS[-1] * width
        outs = (8, 4, 2, 1, 1)
        for name, out, skip in zip(self.names, outs, reversed(_FACTORS[:-1]), strict=True):
            both = (out + skip) * width
            up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.add_module(f"up{name}", nn.Sequential(up, *_convs(into, out * width, 1)))
            if attentive:
                self.add_module(f"se{name}", _ChannelAttention(both))
            self.add_module(f"db{name}", _convs(both, out * width, 1 if attentive else 2))
            into = out * width
        last = nn.Conv2d(into, 2, 3, padding=1)
        self.fin_out = last if attentive else nn.Sequential(last)
        self.attentive = attentive

    def forward(self, maps: list[Tensor]) -> Tensor:
        found = maps[-1]
        for name, skip in zip(self.names, reversed(maps[:-1]), strict=True):
            part = self.get_submodule
            found = torch.cat([part(f"up{name}")(found), skip], dim=1)
            if self.attentive:
                found = part(f"se{name}")(found)
            found = part(f"db{name}")(found)
        logits: Tensor = self.fin_out(found)
        return logits


class _PooledContext(nn.Module):
    """Maxima over 5, 9 and 13 cells beside the map itself (SPPF)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _conv_norm_relu(channels, channels // 2, 1)
        self.conv2 = _conv_norm_relu(channels // 2 * 4, channels, 1)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        maps = [self.conv1(map_BCHW)]
        for _ in range(3):
            maps.append(F.max_pool2d(maps[-1], 5, stride=1, padding=2))
        mixed: Tensor = self.conv2(torch.cat(maps, dim=1))
        return mixed


class _ChannelAttention(nn.Module):
    """Squeeze and excitation with a sixteenth of the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // 16)
        self.fc = nn.Sequential(
            nn.Linear(channels, inner),
            nn.ReLU(inplace=True),
            nn.Linear(inner, channels),
            nn.Sigmoid(),
        )

    def forward(self, map_BCHW: Tensor) -> Tensor:
        weights_BC: Tensor = self.fc(map_BCHW.mean((2, 3)))
        return map_BCHW * weights_BC[:, :, None, None]


class _OneLogit(nn.Module):
    """The published contract, values in 0 ... 1 and two logits, behind ours.

    The softmax of two logits is the sigmoid of their difference.
    """

    def __init__(self, net: nn.Module, value_range: tuple[float, float]) -> None:
        super().__init__()
        self.net = net
        self.low = value_range[0]
        self.scale = 1 / (value_range[1] - value_range[0])

    def forward(self, planes_BCHW: Tensor) -> Tensor:
        logits_B2HW = self.net((planes_BCHW - self.low) * self.scale)
        background_B1HW, defect_B1HW = logits_B2HW.split(1, dim=1)
        logits: Tensor = defect_B1HW - background_B1HW
        return logits


def _convs(into: int, out: int, num: int) -> nn.Sequential:
    """``num`` times convolution, normalisation, ReLU, in one row: so the published names count."""
    layers: list[nn.Module] = []
    for i in range(num):
        layers += _conv_norm_relu(out if i else into, out, 3, padding=1)
    return nn.Sequential(*layers)


@torch.no_grad()
def multiply_adds(module: nn.Module, height: int, width: int) -> int:
    """Multiply-adds of all convolutions and linear layers for one input (1, 3, height, width)."""
    total = 0

    def count(layer: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        weight = layer.get_parameter(
            "weight"
        )  # (out, in, ...): every output number needs in ... of them
        total += output.numel() * weight[0].numel()

    layers = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    was_training = module.training
    module.eval()(torch.zeros(1, 3, height, width, device=next(module.parameters()).device))
    module.train(was_training)
    for handle in handles:
        handle.remove()
    return total
