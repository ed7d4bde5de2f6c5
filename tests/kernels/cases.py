"""Comparisons of the Triton kernels with their oracles, for the interpreter and for a GPU alike. Needs no test framework."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch

from qpc.kernels import gpu, hadamard, launch, reference, viterbi
from qpc.quant.codebook import code_deviation
from qpc.quant.rotation import Rotation
from qpc.quant.viterbi import encode_rings as cpu_encoder
from tests.kernels import operand_cases, ring_oracle
from tests.kernels.operand_cases import OperandSizes
from tests.kernels.packed import FAMILIES, Packed, packed, poisoned
from tests.kernels.tolerances import ENCODER, assert_close

Check = Callable[[str], None]


@dataclass(frozen=True)
class Sizes:
    """How much is compared: every combination. The interpreter takes milliseconds an instruction, a GPU a second for a new kernel."""

    weights: tuple[tuple[int, int], ...] = ()
    step_bits: tuple[tuple[int, ...], ...] = ()
    bits: tuple[tuple[int, ...], ...] = ()
    vector_bits: tuple[tuple[int, ...], ...] = ()
    suffix_bits: tuple[int, ...] = (10,)
    """Bits of a window of the trellis beyond the step."""
    batches: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    rotations: tuple[tuple[int, int], ...] = ()
    rings: tuple[tuple[int, int, int, int], ...] = ()
    """(rings, steps, step_bits, window_bits)."""
    operands: tuple[OperandSizes, ...] = ()


BATCHES = (1, 2, 3, 4, 7, 8, 16, 17)
"""Each vector kernel alone and repeated, all of them together, and the first batch beyond them."""

SMALL = (
    Sizes(
        weights=((20, 90),),
        step_bits=((3,), (5, 12)),
        bits=((3,), (2, 5)),
        vector_bits=((5,), (4, 7)),
        suffix_bits=(15,),
        batches=(2, 3, 17),
        dtypes=(torch.float32,),
        rotations=((7, 1), (48, 12), (80, 40), (64, 64), (512, 256)),
        rings=((2, 32, 2, 4), (1, 32, 4, 7)),
    ),
    Sizes(weights=((9, 40),), step_bits=((3,),), batches=BATCHES, dtypes=(torch.float32,)),
    Sizes(weights=((9, 40),), bits=((3,),), vector_bits=((6,),), batches=(1, 4), dtypes=(torch.float32,)),
    Sizes(operands=operand_cases.SMALL),
)

EVERY_STEP = (*((bits,) for bits in range(2, 13)), (4, 5), (7, 6), (12, 3))
EVERY_VECTOR_BITS = (*((bits,) for bits in range(4, 13)), (5, 6), (12, 7))
EVERY_BITS = (*((bits,) for bits in range(1, 9)), (2, 3), (8, 5))
EVERY_DTYPE = (torch.float32, torch.float16, torch.bfloat16)

FULL = (
    *SMALL,
    Sizes(weights=((100, 1000),), step_bits=EVERY_STEP, bits=EVERY_BITS, vector_bits=EVERY_VECTOR_BITS, batches=(1, 3, 17)),
    Sizes(weights=((1024, 4096),), step_bits=((6,), (4, 5)), bits=((3,), (2, 3)), vector_bits=((8,),), batches=BATCHES, dtypes=EVERY_DTYPE),
    Sizes(
        weights=((16, 16), (64, 16), (64, 14336), (4096, 512)),
        step_bits=((5,), (5, 6)),
        bits=((4,), (3, 4)),
        vector_bits=((6,), (11, 12)),
        batches=(1, 3),
    ),
    Sizes(weights=((100, 1000),), step_bits=((3,), (9,)), suffix_bits=(9, 13, 15), batches=(1, 3)),
    Sizes(rotations=((576, 576), (1184, 1184), (4096, 4096), (14336, 14336), (4096, 256), (65536, 32768), (11008, 256))),
    Sizes(rotations=((4096, 4096), (576, 576)), dtypes=(torch.float32, torch.float16)),
    Sizes(operands=operand_cases.LARGE),
    Sizes(
        rings=(*((9, 512, bits, bits + 9) for bits in (2, 3, 6, 8, 11)), *((5, 512, bits, bits + 13) for bits in (4, 7)), (3, 512, 5, 19))
    ),
)


def cases(groups: tuple[Sizes, ...]) -> Iterator[tuple[str, Check]]:
    """Every comparison with its name; a check takes the device and raises `AssertionError`."""
    for sizes in groups:
        for shape in sizes.weights:
            for bits in sizes.step_bits:
                for suffix_bits in sizes.suffix_bits:
                    yield from _weight_cases(sizes, "trellis", shape, bits, suffix_bits)
            for bits in sizes.bits:
                yield from _weight_cases(sizes, "scalar", shape, bits, 0)
            for bits, family in product(sizes.vector_bits, ("pairs", "quadruples")):
                yield from _weight_cases(sizes, family, shape, bits, 0)
        for features, block in sizes.rotations:
            for dtype in sizes.dtypes:
                yield f"rotate {features} in blocks of {block} {dtype}", partial(_check_rotation, features, block, dtype)
        for rings, steps, step_bits, window_bits in sizes.rings:
            name = f"encode {rings} rings of {steps} steps of {step_bits} bits, window {window_bits}"
            yield name, partial(_check_encoder, rings, steps, step_bits, window_bits)
        yield from operand_cases.operand_cases(sizes.operands)
    for family in FAMILIES:
        yield f"splits of the input axis, {family}", partial(_check_splits, family)
    yield "rows of a larger weight", _check_row_range
    yield "strided activation", _check_strided


def _weight_cases(
    sizes: Sizes, family: str, shape: tuple[int, int], bits: tuple[int, ...], suffix_bits: int
) -> Iterator[tuple[str, Check]]:
    if len(bits) > -(-shape[1] // 16):
        return
    weight = partial(packed, family, *shape, list(bits), suffix_bits)
    for dtype in sizes.dtypes:
        name = f"{family} {shape[0]}x{shape[1]} bits {bits} and {suffix_bits} {dtype}"
        yield f"{name} dequantize", partial(_check_dequantize, weight, dtype)
    yield f"{family} {shape[0]}x{shape[1]} bits {bits} and {suffix_bits} bit for bit", partial(_check_bits, weight)
    for dtype in sizes.dtypes:
        name = f"{family} {shape[0]}x{shape[1]} bits {bits} and {suffix_bits} {dtype}"
        for batch in sizes.batches:
            yield f"{name} batch {batch}", partial(_check_linear, weight, dtype, batch)


def _run_linear(weight: Packed, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    with poisoned():
        return gpu.linear(x, weight.codes, weight.scales, bias, weight.quantizers, weight.out_features)


def _expected(weight: Packed, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return reference.linear(x, weight.codes, weight.scales, bias, weight.quantizers, weight.out_features)


def _check_linear(make: Callable[..., Packed], dtype: torch.dtype, batch: int, device: str) -> None:
    weight = make(device=device)
    x = torch.randn(batch, weight.in_features, device=device).to(dtype)
    bias = torch.randn(weight.out_features, device=device).to(dtype) if batch != 2 else None
    assert_close(_run_linear(weight, x, bias), _expected(weight, x, bias))


def _check_dequantize(make: Callable[..., Packed], dtype: torch.dtype, device: str) -> None:
    weight = make(device=device)
    arguments = (weight.codes, weight.scales, weight.quantizers, weight.out_features, weight.in_features, dtype)
    with poisoned():
        actual = gpu.dequantize(*arguments)
    assert_close(actual, reference.dequantize(*arguments))


def _check_bits(make: Callable[..., Packed], device: str) -> None:
    """Every code decodes to the same number, by the kernel and by PyTorch, here and on the CPU."""
    weight, here = make(device=device), make()
    ones = torch.ones_like(weight.scales)
    made = gpu.dequantize(weight.codes, ones, weight.quantizers, weight.out_features, weight.in_features, torch.float32).cpu()
    for decoded in (
        torch.cat([part.decode(codes).cpu() for part, codes in zip(weight.quantizers, weight.codes, strict=True)], dim=1),
        torch.cat([part.decode(codes) for part, codes in zip(here.quantizers, here.codes, strict=True)], dim=1),
    ):
        assert torch.equal(made, decoded[: weight.out_features, : weight.in_features])


def _check_rotation(features: int, block: int, dtype: torch.dtype, device: str) -> None:
    signs = torch.randint(0, 256, (Rotation.bytes_for(features),), dtype=torch.uint8, device=device)
    x = torch.randn(2, 3, features, device=device).to(dtype)
    with poisoned():
        assert_close(hadamard.rotate(x, signs, block), reference.rotate(x, signs, block))


def _check_encoder(rings: int, steps: int, step_bits: int, window_bits: int, device: str) -> None:
    """Against the CPU encoder, which tries the same windows."""
    values = code_deviation(step_bits, window_bits) * torch.randn(rings, steps, 2, generator=torch.Generator().manual_seed(0))
    words = viterbi.encode_rings(values.to(device), step_bits, window_bits).cpu()
    assert words.dtype == torch.int32 and words.shape == (rings, steps * step_bits // 32)
    best = cpu_encoder(values, step_bits, window_bits)
    actual, expected = (ring_oracle.squared_error(values, each, step_bits, window_bits) for each in (words, best))
    assert ((actual / expected - 1).abs() <= ENCODER).all(), f"squared errors {actual.tolist()}, of the oracle {expected.tolist()}"


def _check_splits(family: str, device: str) -> None:
    """The second stage gives what one stage gives, for more than one launch."""
    weight = packed(family, 20, 1030, [4], device=device)
    x, bias = torch.randn(3, 1030, device=device), torch.randn(20, device=device)
    choose = gpu.choose_launch
    try:
        gpu.choose_launch = lambda *_, **__: launch.Launch(warps=4, splits=3)  # type: ignore[attr-defined]
        assert_close(_run_linear(weight, x, bias), _expected(weight, x, bias))
    finally:
        gpu.choose_launch = choose  # type: ignore[attr-defined]


def _check_row_range(device: str) -> None:
    whole = packed("trellis", 256, 48, [4], device=device)
    part = replace(whole, out_features=128, codes=[code[1:3] for code in whole.codes], scales=whole.scales[64:192])
    x = torch.randn(1, 48, device=device)
    assert_close(_run_linear(part, x, None), _expected(whole, x, None)[:, 64:192])


def _check_strided(device: str) -> None:
    weight = packed("scalar", 20, 40, [3], device=device)
    for x in (torch.randn(40, 3, device=device).T, torch.randn(3, 50, device=device)[:, :40]):
        assert_close(_run_linear(weight, x, None), _expected(weight, x, None))
