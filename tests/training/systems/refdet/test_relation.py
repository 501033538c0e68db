"""The second look at candidates, held against loops; and that it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engineworks.training.systems.refdet.config import RelationConfig
from engineworks.training.systems.refdet.relation import Relation, moved, moves
from engineworks.training.systems.refdet.relation_task import losses

pytestmark = pytest.mark.train

CONFIG = RelationConfig(parts=2, window=4, margin=2.0, width=16, dropout=0.0)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def test_moves_bring_a_box_where_it_should_be() -> None:
    boxes = torch.tensor([[10.0, 20.0, 30.0, 60.0], [0.0, 0.0, 8.0, 8.0]])
    wanted = torch.tensor([[12.0, 18.0, 36.0, 50.0], [1.0, -1.0, 11.0, 7.0]])
    torch.testing.assert_close(moved(boxes, moves(boxes, wanted)), wanted)


def test_parts_are_the_best_cells_of_each_block() -> None:
    relation = Relation(CONFIG, cells=4)
    cosines, maps = random(3, 16, 5, 6), random(1, 7, 5, 6, seed=1)
    planes = relation.parts(cosines, maps, torch.ones(1, 5, 6))
    assert planes.shape == (3, 5, 5, 6)
    blocks = cosines.reshape(3, 4, 4, 5, 6)
    want = blocks[:, 2:, :2].amax((1, 2))  # lower left
    torch.testing.assert_close(planes[:, 2], want)
    mean = maps[0].mean((1, 2))
    common = (maps[0] * mean[:, None, None]).sum(0) / mean.norm()
    torch.testing.assert_close(planes[1, 4], common, rtol=1e-4, atol=1e-5)


def test_what_lies_beside_a_frame_is_not_common_in_it() -> None:
    relation = Relation(CONFIG, cells=4)
    maps, seen = random(1, 7, 5, 6, seed=1), torch.ones(1, 5, 6)
    seen[:, :, 3:] = 0
    other = maps.clone()
    other[:, :, :, 3:] = 100.0
    (one, two) = (
        relation.parts(random(1, 16, 5, 6), each, seen)[0, 4, :, :3] for each in (maps, other)
    )
    torch.testing.assert_close(one, two)


def test_a_window_lies_over_the_box_and_as_much_around_it() -> None:
    relation = Relation(CONFIG, cells=4)
    columns = torch.arange(16.0).expand(1, 1, 16, 16)
    # twice the box of 4 cells, in 4 parts of 2: their middles are columns 5, 7, 9, 11 less a half
    windows = relation.sample(columns, torch.tensor([[48.0, 48.0, 80.0, 80.0]]), 8)
    assert windows.shape == (1, 1, 4, 4)
    assert windows[0, 0, 1].tolist() == pytest.approx([4.5, 6.5, 8.5, 10.5])
    assert windows[0, 0, :, 2].tolist() == pytest.approx([8.5] * 4)


def test_it_learns_which_candidates_are_right_and_where_they_end() -> None:
    torch.manual_seed(0)
    relation = Relation(CONFIG, cells=4)
    windows, facts = random(64, 6, 4, 4), random(64, 8, seed=1)
    overlaps = (windows[:, 0].mean((1, 2)) > 0).float()
    batch = {
        "windows": windows,
        "facts": facts,
        "overlaps": overlaps,
        "moves": 0.2 * facts[:, :4].clamp(-2, 2),
    }
    optimizer = torch.optim.Adam(relation.parameters(), lr=1e-2)
    first = losses(relation, batch, CONFIG)
    for _ in range(60):
        optimizer.zero_grad()
        found = losses(relation, batch, CONFIG)
        found["loss"].backward()
        optimizer.step()
    assert found["score"] < 0.2 * first["score"]
    assert found["box"] < 0.5 * first["box"]


def test_candidates_that_are_neither_right_nor_wrong_say_nothing() -> None:
    relation = Relation(CONFIG, cells=4)
    batch = {
        "windows": random(4, 6, 4, 4),
        "facts": random(4, 8),
        "overlaps": torch.full((4,), 0.35),
        "moves": torch.zeros(4, 4),
    }
    assert losses(relation, batch, CONFIG)["score"] == 0
