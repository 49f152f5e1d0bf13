"""A cache of keys and values with room for more tokens.

The cache of transformers copies all keys and values for each new token. So decoding a reply of n tokens copies about
n * n / 2 of them. This one writes the new token beside the others, and copies when the room is used up.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

ROOM = 32  # tokens


class RoomyLayer(DynamicLayer):
    """A layer of DynamicCache, whose keys and values (B, H, n, D) are the beginnings of longer buffers."""

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        vars(self).update(vars(layer))
        self.buffers: dict[str, torch.Tensor] = {}  # of keys and of values
        self.views: dict[str, torch.Tensor] = {}  # their beginnings, as this layer has made them

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the keys and values (B, H, new, D) of new tokens, and return those of all."""
        self.keys, self.values = self._add("keys", key_states), self._add("values", value_states)
        return self.keys, self.values

    def _add(self, name: str, new: torch.Tensor) -> torch.Tensor:
        known, buffer = getattr(self, name), self.buffers.get(name)
        n = known.shape[-2]
        end = n + new.shape[-2]
        # other rows were chosen, or a cache was put in, if it is not what this layer has made
        if buffer is None or known is not self.views[name] or end > buffer.shape[-2]:
            buffer = known.new_empty((*known.shape[:-2], end + ROOM, known.shape[-1]))
            buffer[..., :n, :] = known
        buffer[..., n:end, :] = new
        self.buffers[name], self.views[name] = buffer, buffer[..., :end, :]
        return self.views[name]


def give_room(cache: Any) -> Any:
    """Return a cache with RoomyLayer in place of each plain layer that has keys and values. Others stay."""
    if isinstance(cache, DynamicCache):
        plain = (type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers)
        cache.layers = [RoomyLayer(layer) if is_plain else layer for layer, is_plain in zip(cache.layers, plain)]
    return cache
