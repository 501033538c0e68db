from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.systems.refdet.cache import FeatureCache

pytestmark = pytest.mark.train


class Encoder:
    """Doubles the first values of a picture, and remembers how many it was given at once."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, pictures_BCHW: Tensor) -> Tensor:
        self.batches.append(len(pictures_BCHW))
        return 2 * pictures_BCHW.flatten(1)[:, :4]


def test_a_picture_is_encoded_once() -> None:
    encode, cache = Encoder(), FeatureCache(2**20)
    pictures = torch.randn(3, 3, 2, 2)
    first = cache.features(encode, ["a", "b", "a"], pictures[[0, 1, 0]])
    again = cache.features(encode, ["b", "c"], pictures[[1, 2]])
    assert torch.equal(first, 2 * pictures.flatten(1)[[0, 1, 0], :4])
    assert torch.equal(again, 2 * pictures.flatten(1)[[1, 2], :4])
    assert (cache.hits, cache.misses) == (2, 3)


def test_what_is_kept_does_not_depend_on_what_else_was_new() -> None:
    encode = Encoder()
    FeatureCache(2**20).features(encode, ["a", "b", "c"], torch.randn(3, 3, 2, 2))
    assert encode.batches == [1, 1, 1]


def test_the_least_recently_used_ones_make_room() -> None:
    encode, cache = Encoder(), FeatureCache(2 * 4 * 4)  # two rows of four float32
    pictures = torch.randn(3, 3, 2, 2)
    cache.features(encode, ["a", "b"], pictures[:2])
    cache.features(encode, ["a", "c"], pictures[[0, 2]])  # b goes
    assert cache.num_bytes == 32
    cache.features(encode, ["a", "c"], pictures[[0, 2]])
    assert (cache.hits, cache.misses) == (3, 3)
    cache.features(encode, ["b"], pictures[1:2])
    assert cache.misses == 4


def test_without_room_nothing_is_kept() -> None:
    cache = FeatureCache(0)
    for _ in range(2):
        cache.features(Encoder(), ["a"], torch.randn(1, 3, 2, 2))
    assert (cache.hits, cache.num_bytes) == (0, 0)


def test_keeps_no_gradient() -> None:
    weight = torch.ones(12, requires_grad=True)
    cache = FeatureCache(2**20)
    for _ in range(2):
        row = cache.features(lambda p: p.flatten(1) * weight, ["a"], torch.randn(1, 3, 2, 2))
        assert not row.requires_grad
