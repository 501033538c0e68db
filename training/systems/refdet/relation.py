"""A learned second look at the candidates of matching: is it the object, and where does it end?

It sees similarities alone, never what they are of, so what it learns on some kinds of object holds
for others. Over a window around a candidate's box lie planes: how much each place looks like each
part of the object, like the frame as a whole, and like a box of the candidate's size there.

Source: DE-ViT (arXiv 2309.12969), whose boxes grow from maps of similarities as well.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engineworks.training.systems.refdet.config import RelationConfig

NUM_FACTS = 8  # of a candidate beside its planes; one more where kinds are told
_EPS = 1e-6
_LARGEST = 0.7  # logarithm of how many times a side may become as long


def resampled(places_K: Tensor, size: int) -> Tensor:
    """(..., K, size): what linear interpolation takes of a row of cells at places in it.

    Args:
        places_K: (..., K) in cells; the first cell's centre is 0. Outside of the row is nothing.
        size: cells of the row.
    """
    cells = torch.arange(size, dtype=places_K.dtype, device=places_K.device)
    return (1 - (places_K[..., None] - cells).abs()).clamp(min=0)


def averaged(low_R: Tensor, side_R: Tensor, num: int, size: int) -> Tensor:
    """(R, num, size): what ``num`` equal parts of a stretch take of a row, each at two places.

    Args:
        low_R, side_R: beginning and length of the stretch, in cells of the row.
    """
    shares = (torch.arange(2 * num, dtype=low_R.dtype, device=low_R.device) + 0.5) / (2 * num)
    places_RK = low_R[:, None] + side_R[:, None] * shares - 0.5
    return resampled(places_RK, size).reshape(-1, num, 2, size).mean(2)


class Relation(nn.Module):
    """Planes and facts of a candidate -> a logit, and how its box moves.

    Attributes:
        num_planes: of a candidate.
    """

    def __init__(self, config: RelationConfig, cells: int, num_facts: int = NUM_FACTS) -> None:
        """Build it.

        Args:
            cells: rows and columns of a template; a multiple of ``config.parts``.
            num_facts: of a candidate.
        """
        super().__init__()
        self.config = config
        self.cells = cells
        self.num_planes = config.parts**2 + 2
        self.planes = nn.Linear(self.num_planes * config.window**2, config.width)
        self.facts = nn.Linear(num_facts, config.width)
        self.hidden = nn.Linear(config.width, config.width)
        self.out = nn.Linear(config.width, 5)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.dropout = nn.Dropout(config.dropout)

    def parts(self, cosines_RKHW: Tensor, maps_BCHW: Tensor, seen_BHW: Tensor) -> Tensor:
        """(R, planes - 1, h, w): how much each place looks like each part, and like the frame.

        Args:
            cosines_RKHW: of the t x t cells of templates, R of them for each of the B frames.
            seen_BHW: 1 where a frame is.
        """
        num, each = self.config.parts, self.cells // self.config.parts
        height, width = maps_BCHW.shape[2:]
        blocks = cosines_RKHW.reshape(-1, num, each, num, each, height * width).amax((2, 4))
        weighted = maps_BCHW * seen_BHW[:, None]
        mean_BC1 = weighted.flatten(2).mean(2, keepdim=True)
        mean_BC1 = mean_BC1 / (mean_BC1.square().sum(1, keepdim=True) + _EPS).sqrt()
        common_B1P = (maps_BCHW.flatten(2) * mean_BC1).sum(1, keepdim=True)
        repeats = blocks.shape[0] // common_B1P.shape[0]
        common_R1P = common_B1P[:, None].expand(-1, repeats, -1, -1).reshape(-1, 1, height * width)
        planes = torch.cat([blocks.flatten(1, 2), common_R1P], 1)
        return planes.reshape(planes.shape[0], planes.shape[1], height, width)

    def sample(self, planes_MKHW: Tensor, boxes_M4: Tensor, stride: int) -> Tensor:
        """(M, K, c, c): planes over windows around boxes.

        Args:
            boxes_M4: xyxy in pixels.
        """
        height, width = planes_MKHW.shape[2:]
        middle_M2 = (boxes_M4[:, :2] + boxes_M4[:, 2:]) / (2 * stride)
        side_M2 = self.config.margin * (boxes_M4[:, 2:] - boxes_M4[:, :2]) / stride
        low_M2 = middle_M2 - side_M2 / 2
        down = averaged(low_M2[:, 1], side_M2[:, 1], self.config.window, height)
        across = averaged(low_M2[:, 0], side_M2[:, 0], self.config.window, width)
        rows = torch.matmul(down[:, None], planes_MKHW)
        return torch.matmul(rows, across[:, None].transpose(2, 3))

    def forward(self, windows_MKCC: Tensor, facts_MF: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (M,), and moves (M, 4): of the centre in sides, and logarithms of the sides."""
        seen = self.planes(self.dropout(windows_MKCC.flatten(1))) + self.facts(facts_MF)
        found_M5 = self.out(torch.relu(self.hidden(torch.relu(seen))))
        return found_M5[:, 0], found_M5[:, 1:].clamp(-_LARGEST, _LARGEST)


def moved(boxes_M4: Tensor, moves_M4: Tensor) -> Tensor:
    """Boxes xyxy where moves bring them."""
    side_M2 = boxes_M4[:, 2:] - boxes_M4[:, :2]
    middle_M2 = (boxes_M4[:, :2] + boxes_M4[:, 2:]) / 2 + side_M2 * moves_M4[:, :2]
    half_M2 = side_M2 * moves_M4[:, 2:].exp() / 2
    return torch.cat([middle_M2 - half_M2, middle_M2 + half_M2], 1)


def moves(boxes_M4: Tensor, wanted_M4: Tensor) -> Tensor:
    """What brings boxes where they should be; the inverse of ``moved``."""
    side_M2 = boxes_M4[:, 2:] - boxes_M4[:, :2]
    apart_M2 = (wanted_M4[:, :2] + wanted_M4[:, 2:] - boxes_M4[:, :2] - boxes_M4[:, 2:]) / 2
    larger_M2 = (wanted_M4[:, 2:] - wanted_M4[:, :2]).clamp(min=1e-3) / side_M2
    return torch.cat([apart_M2 / side_M2, larger_M2.log()], 1).clamp(-_LARGEST, _LARGEST)
