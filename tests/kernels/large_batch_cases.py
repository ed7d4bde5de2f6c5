"""Comparisons of decoding and of large batches with their oracles, for the interpreter and for a GPU alike. Needs no test framework."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from qpc.kernels import large_batch, reference
from qpc.kernels.dequantize import decode_rows
from qpc.kernels.large_batch import Strategy
from tests.kernels.cases import Check
from tests.kernels.packed import FAMILIES, packed, poisoned
from tests.kernels.tolerances import assert_close

SHAPES = ((1, 1), (70, 34), (64, 16), (100, 290), (200, 131))
"""One column of blocks and several, whole programs and not, rows of whole words, lines and neither."""

STRATEGIES = (Strategy(), Strategy(64), Strategy(128, overlapped=True), Strategy(64, overlapped=True))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def cases(quick: bool) -> Iterator[tuple[str, Check]]:
    """Every comparison with its name. quick: few of them."""
    for family, shape, dtype in product(FAMILIES, SHAPES[1:2] if quick else SHAPES, (torch.float16,) if quick else DTYPES):
        bits = (7, 4) if shape[1] > 16 else (5,)
        yield f"decode {family} {shape[0]}x{shape[1]} bits {bits} {dtype}", partial(_check_decoded, family, shape, bits, 10, dtype)
    for step_bits, suffix_bits in ((3, 13), (4, 15)) if quick else product(range(2, 13), (10, 13)):
        name = f"decode steps of {step_bits} bits, window {step_bits + suffix_bits}"
        yield name, partial(_check_decoded, "trellis", (33, 130), (step_bits,), suffix_bits, torch.bfloat16)
    for columns in (4,) if quick else (2, 4, 16):
        yield f"decode {columns} block columns a program", partial(_check_columns, columns)
    yield "decode some block rows", _check_rows
    for strategy, dtype in product(STRATEGIES[:2] if quick else STRATEGIES, (torch.float32,) if quick else DTYPES):
        yield f"large batch {strategy} {dtype}", partial(_check_strategy, strategy, dtype)
    if not quick:
        yield "large batch in a CUDA graph", _check_captured


def _check_decoded(family: str, shape: tuple[int, int], bits: tuple[int, ...], suffix_bits: int, dtype: torch.dtype, device: str) -> None:
    weight = packed(family, *shape, list(bits), suffix_bits, device)
    with poisoned():
        out = torch.empty(shape, dtype=dtype, device=device)
        decode_rows(weight.codes, weight.scales, weight.quantizers, out)
    assert_close(out, reference.dequantize(weight.codes, weight.scales, weight.quantizers, *shape, dtype))


def _check_columns(columns: int, device: str) -> None:
    weight = packed("trellis", 33, 300, [6, 5], device=device)
    with poisoned():
        out = torch.empty(33, 300, dtype=torch.float16, device=device)
        decode_rows(weight.codes, weight.scales, weight.quantizers, out, columns_per_program=columns)
    assert_close(out, reference.dequantize(weight.codes, weight.scales, weight.quantizers, 33, 300, torch.float16))


def _check_rows(device: str) -> None:
    """A range of rows is decoded alone, and nothing beyond it is written."""
    weight = packed("trellis", 250, 48, [6], device=device)
    out = torch.full((250, 48), -1.0, dtype=torch.bfloat16, device=device)
    decode_rows(weight.codes, weight.scales, weight.quantizers, out[30:100], first=128)
    expected = reference.dequantize(weight.codes, weight.scales, weight.quantizers, 250, 48, torch.bfloat16)
    assert_close(out[30:100], expected[128:198])
    assert (out[:30] == -1).all() and (out[100:] == -1).all()


def _check_strategy(strategy: Strategy, dtype: torch.dtype, device: str) -> None:
    weight = packed("trellis", 200, 80, [4, 5], device=device)
    x = torch.randn(37, 80, device=device).to(dtype)
    for bias in (None, torch.randn(200, device=device).to(dtype)):
        with poisoned():
            actual = large_batch.multiply(x, weight.codes, weight.scales, bias, weight.quantizers, 200, strategy)
        assert_close(actual, reference.linear(x, weight.codes, weight.scales, bias, weight.quantizers, 200))


def _check_captured(device: str) -> None:
    """A graph with two streams gives the product of what its input holds when it is replayed. Needs a GPU."""
    weight = packed("trellis", 450, 80, [4], device=device)
    x = torch.randn(37, 80, device=device).half()
    run = partial(large_batch.multiply, x, weight.codes, weight.scales, None, weight.quantizers, 450, Strategy(64, overlapped=True))
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(2):
        x.copy_(torch.randn(37, 80, device=device))
        out.fill_(float("nan"))
        graph.replay()
        assert_close(out, reference.linear(x, weight.codes, weight.scales, None, weight.quantizers, 450))
