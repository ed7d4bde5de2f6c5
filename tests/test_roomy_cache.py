"""A cache with room holds what one that grows holds, where it was put."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache, DynamicLayer

from qpc.roomy_cache import RoomyLayer, give_room
from qpc.sampling import cache_name
from tests.families import model, tokens


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(0, 3), st.integers(0, 99))
def test_room_changes_nothing_and_nothing_is_copied(counts: list[int], spare: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    grown, cache = DynamicCache(), DynamicCache()
    places: Any = None
    for number, count in enumerate(counts):
        keys, values = torch.randn(2, 3, count, 4, generator=draw), torch.randn(2, 3, count, 5, generator=draw)
        expected, found = grown.update(keys, values, 0), cache.update(keys, values, 0)
        if number == 0:
            give_room(cache, sum(counts) + spare)
            places = cache.layers[0].keys.data_ptr(), cache.layers[0].values.data_ptr()
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
        assert cache.get_seq_length() == grown.get_seq_length()
    layer = cache.layers[0]
    assert torch.equal(layer.keys, grown.layers[0].keys) and (layer.keys.data_ptr(), layer.values.data_ptr()) == places


def test_layers_that_forget_and_caches_without_layers_stay() -> None:
    network = model("gemma3")
    with torch.no_grad():
        cache = getattr(network(tokens(), use_cache=True), cache_name(network))
    before = list(cache.layers)
    give_room(cache, 64)
    assert [type(layer) is RoomyLayer for layer in cache.layers] == [type(layer) is DynamicLayer for layer in before] == [False, True]
    assert cache.layers[0] is before[0]
    give_room(object(), 64)
