"""The share of each rank, without vLLM: which rows and columns it holds, that the shares make the whole, and what is refused."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from qpc.errors import CheckpointError
from qpc.integrations.vllm.parameters import PackedParameters
from qpc.integrations.vllm.stack import Rank, Stack
from qpc.integrations.vllm.stored import StoredWeight
from qpc.kernels.linear import QuantizedLinear
from qpc.quant.quantizer import PackedWeight
from qpc.quant.trellis import TrellisQuantizer
from tests.quant.coded import coded

QUANTIZER = TrellisQuantizer(4, 13)


def linear(name: str, rows: int, columns: int = 128, block: int = 64) -> StoredWeight:
    return StoredWeight(f"model.{name}", rows, columns, QUANTIZER, block)


def packed(stored: StoredWeight, seed: int) -> PackedWeight:
    return coded(stored.quantizer, stored.out_features, stored.in_features, stored.block, seed)


class Layer(nn.Module):
    """What a rank holds of some members, filled from them tensor by tensor."""

    def __init__(self, members: list[StoredWeight], stack: Stack, weights: list[PackedWeight]) -> None:
        super().__init__()
        self.held = PackedParameters("model.layer", members, stack)
        self.held.register(self)
        for index, weight in enumerate(weights):
            for leaf, tensor in QuantizedLinear.from_packed(weight).named_buffers():
                getattr(self, leaf).weight_loader(getattr(self, leaf), tensor, index if len(members) > 1 else None)
        self.held.check_complete()

    def forward(self, x: Tensor) -> Tensor:
        kept, columns = self.held.stack.kept, self.held.stack.shard.columns
        y = self.held.multiply(self, x[:, columns.start : columns.stop], None, kept[-1].stop)
        return torch.cat([y[:, rows] for rows in kept], dim=-1)


@pytest.mark.parametrize(
    ("members", "wholes", "sizes"),
    [
        ([linear("q", 256), linear("k", 64), linear("v", 64)], [256, 64, 64], [128, 64, 64]),
        ([linear("gate", 192), linear("up", 192)], [192, 192], [192, 192]),
        ([linear("gate", 40), linear("up", 40)], [40, 40], [40, 40]),
        ([linear("gate_up", 256)], [128, 128], [64, 64]),
        ([linear("qkv", 100)], [60, 20, 20], [60, 20, 20]),
    ],
    ids=["key and value on both ranks", "replicated", "padding between members", "fused in the checkpoint", "whole and unaligned"],
)
def test_rows_of_two_ranks(members: list[StoredWeight], wholes: list[int], sizes: list[int]) -> None:
    weights = [packed(member, seed) for seed, member in enumerate(members)]
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(9))
    full = torch.cat([QuantizedLinear.from_packed(weight)(x) for weight in weights], dim=-1).split(wholes, dim=-1)
    for index in range(2):
        stack = Stack.of("model.layer", members, list(zip(wholes, sizes, strict=True)), 128, Rank(index, 2))
        expected = [
            part[:, index * size :][:, :size] if size < whole else part for part, whole, size in zip(full, wholes, sizes, strict=True)
        ]
        torch.testing.assert_close(Layer(members, stack, weights)(x), torch.cat(expected, dim=-1), rtol=1e-5, atol=1e-5)


def test_ranks_share_key_value_heads_in_order() -> None:
    members = [linear("k", 128)]
    held = [Stack.of("model.k", members, [(128, 64)], 128, Rank(index, 4)).shard.rows for index in range(4)]
    assert held == [range(0, 64), range(0, 64), range(64, 128), range(64, 128)]


def test_columns_of_ranks_add_up() -> None:
    member = linear("down", 96)
    weight = packed(member, 0)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(9))
    shares = [Stack.of("model.down", [member], [(96, 96)], 64, Rank(index, 2)) for index in range(2)]
    found = sum(Layer([member], stack, [weight])(x) for stack in shares)
    torch.testing.assert_close(found, QuantizedLinear.from_packed(weight)(x), rtol=1e-5, atol=1e-5)


def test_every_stored_code_lies_on_some_rank() -> None:
    members = [linear("gate", 256), linear("up", 256)]
    held = {(piece.member, row) for index in range(4) for piece in share(members, index).pieces for row in piece.shard.rows}
    assert held == set(product(range(2), range(256)))


def share(members: list[StoredWeight], index: int) -> Stack:
    return Stack.of("model.gate_up", members, [(256, 64), (256, 64)], 128, Rank(index, 4))


@pytest.mark.parametrize(
    ("member", "outputs", "inputs", "message"),
    [
        (linear("k", 192), [(192, 96)], 128, r"k: rows 0 to 96 .* multiples of 64 .*split its rows into 1 or 3 parts"),
        (linear("k", 100), [(100, 50)], 128, r"k: rows 0 to 50 .*split its rows into 1 parts"),
        (
            linear("o", 64, 128, 128),
            [(64, 64)],
            64,
            r"columns 0 to 64 of 128 .*block of the rotation.*--rotation-block 64",
        ),
        (linear("down", 64, 1536, 1536), [(64, 64)], 768, "columns 0 to 768 .*--rotation-block 256"),
        (linear("o", 64, 144, 8), [(64, 64)], 72, r"columns 0 to 72 of 144 .*split its columns into 1, 3 or 9 parts"),
        (linear("o", 64, 128), [(64, 64)], 48, r"each of 2 ranks needs 64x48 of model\.layer, the checkpoint has model\.o 64x128"),
        (linear("o", 64, 128), [(128, 64)], 128, "needs 64x128"),
        (linear("o", 256, 128), [(256, 64)], 128, "needs 64x128"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_split_is_refused(member: StoredWeight, outputs: list[tuple[int, int]], inputs: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Stack.of("model.layer", [member], outputs, inputs, Rank(0, 2))
