"""What a frozen encoder said of a picture, kept across the whole run."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class FeatureCache:
    """Features by the key of a picture; the least recently used ones make room.

    It stands in the training process: loader workers share it by not knowing of it.

    Attributes:
        hits, misses: pictures asked for since the cache was made, found and computed.
        num_bytes: of what it holds.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.hits = self.misses = self.num_bytes = 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def features(
        self,
        encode: Callable[[Tensor], Tensor],
        keys: Sequence[str],
        pictures_RCHW: Tensor,
    ) -> Tensor:
        """(R, F) features of pictures, each computed when it is first seen.

        One picture at a time: what is kept must not depend on what else was new in its batch, or a
        resumed run, which begins with an empty cache, would become another one.

        Args:
            encode: (B, C, H, W) -> (B, F); always the same function.
            keys: of the pictures' content; two pictures with the same key are the same.
        """
        rows: list[Tensor] = []
        for i, key in enumerate(keys):
            row_F = self._kept.get(key)
            if row_F is None:
                self.misses += 1
                row_F = encode(pictures_RCHW[i : i + 1])[0].detach()
                self._keep(key, row_F)
            else:
                self.hits += 1
                self._kept.move_to_end(key)
            rows.append(row_F)
        return torch.stack(rows)

    def _keep(self, key: str, row_F: Tensor) -> None:
        self._kept[key] = row_F
        self.num_bytes += row_F.nbytes
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= self._kept.popitem(last=False)[1].nbytes
