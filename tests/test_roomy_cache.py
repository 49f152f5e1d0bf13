"""The cache with room holds what transformers' own cache holds, and does not copy it for each token."""

import torch
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from support.roomy_cache import ROOM, RoomyLayer, give_room

CHOSEN = {7: [3, 0, 0, 1], 17: [2, 1, 0], 40: [1]}  # rows, after so many tokens


def grown(tokens: int, cache: DynamicCache, seed: int = 0) -> None:
    """Add tokens one by one to both layers of a cache, whose rows are chosen anew in between."""
    generator = torch.Generator().manual_seed(seed)
    for t in range(tokens):
        for layer in range(2):
            rows = cache.layers[layer].keys.shape[0]
            cache.update(*(torch.randn((rows, 3, 1, 4), generator=generator) for _ in range(2)), layer)
        if t in CHOSEN:
            cache.reorder_cache(torch.tensor(CHOSEN[t]))


def filled() -> DynamicCache:
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.full((4, 3, 5, 4), layer + 1.0), torch.full((4, 3, 5, 4), -1.0), layer)
    return cache


def test_it_holds_what_the_plain_cache_holds():
    plain, roomy = filled(), give_room(filled())
    assert all(type(layer) is RoomyLayer for layer in roomy.layers) and give_room(roomy).layers == roomy.layers
    for cache in (plain, roomy):
        grown(2 * ROOM, cache)
    for one, other in zip(plain.layers, roomy.layers):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
    assert plain.get_seq_length() == roomy.get_seq_length() == 5 + 2 * ROOM


def test_tokens_are_written_beside_the_others_until_the_room_is_used_up():
    [layer, _] = give_room(filled()).layers
    places = []
    for _ in range(ROOM + 3):
        keys, values = layer.update(torch.zeros((4, 3, 1, 4)), torch.zeros((4, 3, 1, 4)))
        places.append((keys.data_ptr(), values.data_ptr()))
    assert len(set(places)) == 2 and len(set(places[: ROOM + 1])) == 1
    before = layer.keys.clone()
    layer.reorder_cache(torch.tensor([1, 1]))  # a copy of two rows, to which the next token does not write
    layer.update(torch.ones((2, 3, 1, 4)), torch.ones((2, 3, 1, 4)))
    assert torch.equal(layer.keys[:, :, :-1], before[[1, 1]]) and layer.keys[:, :, -1].eq(1).all()


def test_other_layers_stay():
    cache = DynamicCache()
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=4)]
    assert type(give_room(cache).layers[0]) is DynamicSlidingWindowLayer
    assert give_room(None) is None
