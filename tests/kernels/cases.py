"""Comparisons of the Triton kernels with their oracles, for the interpreter and for a GPU alike. Needs no test framework."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from qpc.kernels import hadamard, launch, reference, scalar, trellis, viterbi
from qpc.quant.bitstring import pack
from qpc.quant.rotation import Rotation
from tests.kernels import ring_oracle
from tests.kernels.packed import Packed, packed, poisoned
from tests.kernels.tolerances import ENCODER, assert_close

Check = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """How much is compared. The interpreter takes milliseconds for an instruction, a GPU nothing for all of it."""

    weights: tuple[tuple[int, int], ...]
    step_bits: tuple[tuple[int, ...], ...]
    bits: tuple[tuple[int, ...], ...]
    window_bits: tuple[int, ...]
    batches: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    rotations: tuple[tuple[int, int], ...]
    rings: tuple[tuple[int, int, int, int], ...]
    """(rings, steps, step_bits, window_bits)."""


SMALL = Sizes(
    weights=((20, 90),),
    step_bits=((3,), (5, 12)),
    bits=((3,), (2, 5)),
    window_bits=(20,),
    batches=(2, 3, 17),
    dtypes=(torch.float32,),
    rotations=((7, 1), (48, 12), (80, 40), (64, 64), (512, 256)),
    rings=((5, 32, 4, 6), (1, 32, 8, 8), (2, 32, 2, 6)),
)

FULL = Sizes(
    weights=((16, 16), (100, 1000), (1024, 4096), (64, 14336)),
    step_bits=(*((bits,) for bits in range(3, 13)), (4, 5), (7, 6), (12, 3)),
    bits=(*((bits,) for bits in range(1, 9)), (2, 3), (8, 5)),
    window_bits=(12, 16, 20),
    batches=(1, 2, 3, 4, 8, 16, 17),
    dtypes=(torch.float32, torch.float16, torch.bfloat16),
    rotations=(*SMALL.rotations, (576, 576), (1184, 1184), (4096, 4096), (14336, 14336), (4096, 256), (65536, 32768), (11008, 11008 // 43)),
    rings=(
        *((9, 128, bits, 12) for bits in range(3, 13)),
        (5, 128, 4, 16),
        (5, 128, 6, 16),
        (5, 128, 8, 16),
        (3, 128, 5, 18),
        (2, 128, 4, 20),
    ),
)


def cases(sizes: Sizes) -> Iterator[tuple[str, Check]]:
    """Every comparison with its name; a check takes the device and raises `AssertionError`."""
    for out_features, in_features in sizes.weights:
        for family, each in (("trellis", sizes.step_bits), ("scalar", sizes.bits)):
            for bits in each:
                if len(bits) > -(-in_features // 16):
                    continue
                for window_bits in sizes.window_bits if family == "trellis" else (0,):
                    name = f"{family} {out_features}x{in_features} bits {bits} window {window_bits}"
                    weight = partial(packed, family, out_features, in_features, list(bits), window_bits)
                    for dtype in sizes.dtypes:
                        yield f"{name} {dtype} dequantize", partial(_check_dequantize, weight, dtype)
                        for batch in sizes.batches:
                            yield f"{name} {dtype} batch {batch}", partial(_check_linear, weight, dtype, batch)
    for features, block in sizes.rotations:
        for dtype in sizes.dtypes:
            yield f"rotate {features} in blocks of {block} {dtype}", partial(_check_rotation, features, block, dtype)
    for rings, steps, step_bits, window_bits in sizes.rings:
        name = f"encode {rings} rings of {steps} steps of {step_bits} bits, window {window_bits}"
        yield name, partial(_check_encoder, rings, steps, step_bits, window_bits)
    yield "encode in several groups of states", _check_groups
    yield "splits of the input axis", _check_splits
    yield "rows of a larger weight", _check_row_range
    yield "strided activation", _check_strided


def _run_linear(weight: Packed, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    run = trellis.trellis_linear if weight.family == "trellis" else scalar.scalar_linear
    with poisoned():
        return run(x, weight.codes, weight.scales, bias, *weight.format, weight.out_features)


def _expected(weight: Packed, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return reference.linear(x, weight.codes, weight.scales, bias, weight.quantizers, weight.out_features)


def _check_linear(make: Callable[..., Packed], dtype: torch.dtype, batch: int, device: str) -> None:
    weight = make(device=device)
    x = torch.randn(batch, weight.in_features, device=device).to(dtype)
    bias = torch.randn(weight.out_features, device=device).to(dtype) if batch != 2 else None
    assert_close(_run_linear(weight, x, bias), _expected(weight, x, bias))


def _check_dequantize(make: Callable[..., Packed], dtype: torch.dtype, device: str) -> None:
    weight = make(device=device)
    run = trellis.trellis_dequantize if weight.family == "trellis" else scalar.scalar_dequantize
    with poisoned():
        actual = run(weight.codes, weight.scales, *weight.format, weight.out_features, weight.in_features, dtype)
    arguments = (weight.codes, weight.scales, weight.quantizers, weight.out_features, weight.in_features, dtype)
    assert_close(actual, reference.dequantize(*arguments))


def _check_rotation(features: int, block: int, dtype: torch.dtype, device: str) -> None:
    signs = torch.randint(0, 256, (Rotation.bytes_for(features),), dtype=torch.uint8, device=device)
    x = torch.randn(2, 3, features, device=device).to(dtype)
    with poisoned():
        assert_close(hadamard.rotate(x, signs, block), reference.rotate(x, signs, block))


def _check_encoder(rings: int, steps: int, step_bits: int, window_bits: int, device: str) -> None:
    values = 148 * torch.randn(rings, steps, 2, generator=torch.Generator().manual_seed(0))
    words = viterbi.encode_rings(values.to(device), step_bits, window_bits).cpu()
    assert words.dtype == torch.int32 and words.shape == (rings, steps * step_bits // 32)
    best = pack(ring_oracle.search(values, step_bits, window_bits), step_bits)
    actual, expected = (ring_oracle.squared_error(values, each, step_bits, window_bits) for each in (words, best))
    assert ((actual / expected - 1).abs() <= ENCODER).all(), f"squared errors {actual.tolist()}, of the oracle {expected.tolist()}"


def _check_groups(device: str) -> None:
    states = viterbi.STATES
    try:
        viterbi.STATES = 8
        _check_encoder(2, 32, 2, 7, device)
    finally:
        viterbi.STATES = states


def _check_splits(device: str) -> None:
    """The second stage gives what one stage gives."""
    weight = packed("trellis", 20, 1030, [4], device=device)
    x = torch.randn(1, 1030, device=device)
    choose = trellis.choose_launch
    try:
        trellis.choose_launch = lambda *_, **__: launch.Launch(warps=4, splits=3)  # type: ignore[attr-defined]
        assert_close(_run_linear(weight, x, None), _expected(weight, x, None))
    finally:
        trellis.choose_launch = choose  # type: ignore[attr-defined]


def _check_row_range(device: str) -> None:
    whole = packed("trellis", 64, 48, [4], device=device)
    part = Packed("trellis", 32, 48, [4], [code[1:3] for code in whole.codes], whole.scales[16:48])
    x = torch.randn(1, 48, device=device)
    assert_close(_run_linear(part, x, None), _expected(whole, x, None)[:, 16:48])


def _check_strided(device: str) -> None:
    weight = packed("scalar", 20, 40, [3], device=device)
    x = torch.randn(40, 3, device=device).T
    assert_close(_run_linear(weight, x, None), _expected(weight, x, None))
