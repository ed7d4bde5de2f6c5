"""The share of each rank, without vLLM: which rows and columns it holds, that the shares make the whole, and what is refused."""

from itertools import product

import pytest
import torch

from qpc.errors import CheckpointError
from qpc.integrations.vllm.stack import Rank, Stack
from qpc.integrations.vllm.stored import StoredLinear
from qpc.kernels.linear import QuantizedLinear
from qpc.quant.quantizer import PackedWeight
from qpc.quant.rotation import Rotation
from qpc.quant.trellis import TrellisQuantizer

QUANTIZER = TrellisQuantizer(4, 13)


def linear(name: str, rows: int, columns: int = 128, block: int = 64) -> StoredLinear:
    return StoredLinear(f"model.{name}", rows, columns, QUANTIZER, block)


def packed(stored: StoredLinear, seed: int) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    made = stored.quantizer.quantize(torch.randn(stored.out_features, stored.in_features, generator=generator))
    rotation = Rotation.random(stored.in_features, torch.Generator().manual_seed(0), stored.block) if stored.block else None
    return PackedWeight(stored.out_features, stored.in_features, stored.quantizer, made.codes, made.scales, rotation)


def filled(stack: Stack, weights: list[PackedWeight]) -> dict[str, torch.Tensor]:
    """The tensors of a rank, from those of the members."""
    found = {leaf: torch.full(shape, 99, dtype=dtype) for leaf, (shape, dtype) in stack.tensors.items()}
    for piece in stack.pieces:
        stored = QuantizedLinear.from_packed(weights[piece.member])
        for leaf, target in found.items():
            target[stack.rows_of(leaf, piece)] = piece.shard.cut(leaf, getattr(stored, leaf))
    return found


def multiply(stack: Stack, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What the layer of a rank makes of its columns of x."""
    rows = stack.kept[-1].stop
    whole = QuantizedLinear(rows, len(stack.shard.columns), stack.shard.local_quantizer, stack.shard.block)
    whole.load_state_dict({leaf: tensor for leaf, tensor in tensors.items() if tensor.numel() or leaf == "signs"}, assign=True)
    y = whole(x[:, stack.shard.columns.start : stack.shard.columns.stop])
    return torch.cat([y[:, kept] for kept in stack.kept], dim=-1)


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
def test_rows_of_two_ranks(members: list[StoredLinear], wholes: list[int], sizes: list[int]) -> None:
    weights = [packed(member, seed) for seed, member in enumerate(members)]
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(9))
    full = torch.cat([QuantizedLinear.from_packed(weight)(x) for weight in weights], dim=-1).split(wholes, dim=-1)
    for index in range(2):
        stack = Stack.of("model.layer", members, list(zip(wholes, sizes, strict=True)), 128, Rank(index, 2))
        expected = [
            part[:, index * size :][:, :size] if size < whole else part for part, whole, size in zip(full, wholes, sizes, strict=True)
        ]
        torch.testing.assert_close(multiply(stack, filled(stack, weights), x), torch.cat(expected, dim=-1), rtol=1e-5, atol=1e-5)


def test_ranks_share_key_value_heads_in_order() -> None:
    members = [linear("k", 128)]
    held = [Stack.of("model.k", members, [(128, 64)], 128, Rank(index, 4)).shard.rows for index in range(4)]
    assert held == [range(0, 64), range(0, 64), range(64, 128), range(64, 128)]


def test_columns_of_ranks_add_up() -> None:
    member = linear("down", 96)
    weight = packed(member, 0)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(9))
    shares = [Stack.of("model.down", [member], [(96, 96)], 64, Rank(index, 2)) for index in range(2)]
    found = sum(multiply(stack, filled(stack, [weight]), x) for stack in shares)
    torch.testing.assert_close(found, QuantizedLinear.from_packed(weight)(x), rtol=1e-5, atol=1e-5)


def test_every_stored_code_lies_on_some_rank() -> None:
    members = [linear("gate", 256), linear("up", 256)]
    held = {(piece.member, row) for index in range(4) for piece in share(members, index).pieces for row in piece.shard.rows}
    assert held == set(product(range(2), range(256)))


def share(members: list[StoredLinear], index: int) -> Stack:
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
        (linear("o", 64, 144, 8), [(64, 64)], 72, r"columns 0 to 72 of 144 .*split its columns into 1, 3 or 9 parts"),
        (linear("o", 64, 128), [(64, 64)], 48, r"each of 2 ranks needs 64x48 of model\.layer, the checkpoint has model\.o 64x128"),
        (linear("o", 64, 128), [(128, 64)], 128, "needs 64x128"),
        (linear("o", 256, 128), [(256, 64)], 128, "needs 64x128"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_split_is_refused(member: StoredLinear, outputs: list[tuple[int, int]], inputs: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Stack.of("model.layer", [member], outputs, inputs, Rank(0, 2))
