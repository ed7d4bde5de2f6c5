"""What does not fit into the parameters of a layer is refused, and so is a layer that is not full."""

from fractions import Fraction

import pytest
import torch
from torch import nn

from qpc.errors import CheckpointError
from qpc.integrations.vllm.parameters import PackedParameters
from qpc.integrations.vllm.stack import Rank, Stack
from qpc.integrations.vllm.stored import StoredWeight
from qpc.quant.mixed import MixedRateQuantizer
from qpc.quant.scalar import ScalarQuantizer

MIXED = MixedRateQuantizer(ScalarQuantizer(4), ScalarQuantizer(5), Fraction(1, 2))


@pytest.fixture
def layer() -> nn.Module:
    """Query, key and value of 64 rows each, without their tensors."""
    members = [StoredWeight(f"attention.{leaf}_proj", 64, 64, ScalarQuantizer(4), 64) for leaf in "qkv"]
    module = nn.Module()
    module.held = PackedParameters("attention.qkv_proj", members, Stack.of("attention.qkv_proj", members, [(64, 64)] * 3, 64, Rank()))
    module.held.register(module)
    return module


def load(layer: nn.Module, leaf: str, tensor: torch.Tensor, shard_id: str | int | None) -> None:
    parameter = getattr(layer, leaf)
    parameter.weight_loader(parameter, tensor, shard_id)


def test_members_land_below_each_other(layer: nn.Module) -> None:
    for value, shard_id in enumerate("vqk"):
        load(layer, "scales", torch.full((64,), value, dtype=torch.bfloat16), shard_id)
    assert layer.scales.reshape(3, 64).unique(dim=1).tolist() == [[1], [2], [0]]


def test_what_is_missing_is_named(layer: nn.Module) -> None:
    for shard_id in "qkv":
        load(layer, "codes0", torch.zeros(1, 4, 128, dtype=torch.int32), shard_id)
        load(layer, "signs", torch.zeros(8, dtype=torch.uint8), shard_id)
        if shard_id != "k":
            load(layer, "scales", torch.zeros(64, dtype=torch.bfloat16), shard_id)
    with pytest.raises(CheckpointError, match=r"lacks the tensor attention\.k_proj\.scales"):
        layer.held.check_complete()


def test_signs_must_agree(layer: nn.Module) -> None:
    signs = torch.arange(8, dtype=torch.uint8)
    load(layer, "signs", signs, "q")
    load(layer, "signs", signs.clone(), "k")
    with pytest.raises(CheckpointError, match=r"attention\.qkv_proj as one weight, but the signs of its members differ: .*--exclude"):
        load(layer, "signs", signs.flip(0), "v")


@pytest.mark.parametrize(
    ("leaf", "tensor", "shard_id", "message"),
    [
        ("scales", torch.zeros(64), "q", r"attention\.q_proj\.scales is torch\.float32, required torch\.bfloat16"),
        ("scales", torch.zeros(32, dtype=torch.bfloat16), "q", r"scales is \(32,\), required \(64,\)"),
        ("codes0", torch.zeros(1, 3, 128, dtype=torch.int32), "q", r"codes0 is \(1, 3, 128\), required \(1, 4, 128\)"),
        ("scales", torch.zeros(64, dtype=torch.bfloat16), None, r"has 3 members, vLLM loads scales of None"),
        ("scales", torch.zeros(64, dtype=torch.bfloat16), 3, r"has 3 members, vLLM loads scales of 3"),
        ("scales", torch.zeros(64, dtype=torch.bfloat16), "index_q", r"has 3 members, vLLM loads scales of 'index_q'"),
    ],
)
def test_what_does_not_fit_is_refused(layer: nn.Module, leaf: str, tensor: torch.Tensor, shard_id: str | int | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(layer, leaf, tensor, shard_id)


@pytest.mark.parametrize("index", range(2))
def test_a_rank_keeps_all_names_of_a_mixed_rate(index: int) -> None:
    """vLLM offers each rank all stored tensors, also those of the part that lies on another."""
    member = StoredWeight("down_proj", 64, 128, MIXED, 64)
    stack = Stack.of("down_proj", [member], [(64, 64)], 64, Rank(index, 2))
    shapes = {leaf: shape for leaf, (shape, _) in stack.tensors.items()}
    assert shapes["codes0"] == (1, 4 * (index == 0), 160) and shapes["codes1"] == (1, 4 * (index == 1), 128)
    assert PackedParameters("down_proj", [member], stack).quantizer == (MIXED.high if index == 0 else MIXED.low)


def test_a_table_ends_with_its_last_rank() -> None:
    table = StoredWeight("embed_tokens", 300, 64, ScalarQuantizer(4), 64)
    held = [Stack.of_table(table, 192, Rank(index, 2)).shard.rows for index in range(2)]
    assert held == [range(0, 192), range(192, 300)]
    with pytest.raises(CheckpointError, match=r"embed_tokens: rows 0 to 160 of 300 must begin and end at multiples of 64"):
        Stack.of_table(table, 160, Rank(0, 2))
