"""Comparisons of the multiplications that no plan chooses yet, for `benchmarks check --product wgmma`. Needs no test framework."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from qpc.kernels import fused, reference
from qpc.kernels.fused import Copies, Finish
from qpc.kernels.operand import pack_operand, unpack_rows
from qpc.kernels.warpgroup import Product, in_cores
from tests.kernels.packed import packed, poisoned
from tests.kernels.tolerances import assert_close

Check = Callable[[str], None]

EVERY_STEP: tuple[tuple[int, ...], ...] = (*((bits,) for bits in range(2, 13)), (4, 5), (7, 6), (12, 3))
SHAPES = ((16, 16), (64, 7), (1000, 4096), (4096, 14336))
"""Besides one small shape at every rate: less than a turn, and many programs for each group of rows."""

VARIANTS = (
    (Product.WGMMA, Finish.BY_FOUR, Copies.BULK), (Product.WGMMA, Finish.WIDE, Copies.BULK), (Product.MMA, Finish.BY_FOUR, Copies.BULK),
    (Product.MMA, Finish.TOGETHER, Copies.BULK), (Product.MMA, Finish.WIDE_BY_FOUR, Copies.BULK), (Product.MMA, Finish.WIDE, Copies.BULK),
    (Product.MMA, Finish.TOGETHER, Copies.PIECES), (Product.MMA, Finish.WIDE, Copies.PIECES),
)  # fmt: skip
BATCHES = (5, 6, 7, 8, 13, 16)


def cases(quick: bool) -> Iterator[tuple[str, Check]]:
    """Every comparison with its name; a check takes the device and raises `AssertionError`."""
    weights = [(100, 1000, bits) for bits in ([(6,)] if quick else EVERY_STEP)]
    weights += [] if quick else [(*shape, (6,)) for shape in SHAPES]
    for out_features, in_features, bits in weights:
        for product, finish, copies in VARIANTS:
            name = f"{product} finish {finish} {copies} {out_features}x{in_features} bits {bits}"
            batches = BATCHES if product is Product.WGMMA else (1, 2, 4, *BATCHES)
            yield name, partial(_check, out_features, in_features, bits, (product, finish, copies), batches)


def _check(
    out_features: int,
    in_features: int,
    bits: tuple[int, ...],
    variant: tuple[Product, Finish, Copies],
    batches: tuple[int, ...],
    device: str,
) -> None:
    """Against the oracle, and bit for bit what the default has: the same exact sums are added in the same order. Again and again."""
    dtype = torch.bfloat16
    product, finish, copies = variant
    weight = packed("trellis", out_features, in_features, list(bits), device=device)
    for batch in batches:
        words, scales = pack_operand(torch.randn(batch, in_features, device=device))
        bias = torch.randn(out_features, device=device).to(dtype) if batch != 6 else None
        cut = fused.plan_of(weight.codes, weight.quantizers, words.shape[1], words.device)
        ordered = in_cores(words) if product is Product.WGMMA else words
        rest = (scales, weight.codes, weight.scales, bias, weight.quantizers, out_features, dtype)
        with poisoned():
            expected = fused.multiply(words, *rest, cut)
            found = [fused.multiply(ordered, *rest, replace(cut, product=product, finish=finish, copies=copies)) for _ in range(20)]
        rows = unpack_rows(words, scales)[:, :in_features]
        assert_close(found[0], reference.linear(rows, weight.codes, weight.scales, bias, weight.quantizers, out_features).to(dtype))
        for each in found:
            assert torch.equal(each, expected), f"batch {batch}: {int((each != expected).sum())} of {each.numel()} differ from the default"
