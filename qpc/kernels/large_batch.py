"""Multiplication of many rows: a part of the weight is decoded to memory, multiplied by cuBLAS, and the next takes its place.

A part that fits into the second-level cache can stay there instead of going to memory and back. The parts are rows of the weight, so they
are columns of the result, which cuBLAS writes where they belong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qpc.kernels.dequantize import decode_rows
from qpc.quant.layout import BLOCK_ROWS
from qpc.quant.quantizer import UniformQuantizer


@dataclass(frozen=True)
class Strategy:
    """How the weight is taken apart.

    rows: of a part, a multiple of 64; None is all at once. overlapped: whether a part is decoded on a second stream while the one before is
    multiplied, for which there are two places.
    """

    rows: int | None = None
    overlapped: bool = False

    def __post_init__(self) -> None:
        assert self.rows is None or (self.rows > 0 and self.rows % BLOCK_ROWS == 0), self

    def parts(self, out_features: int) -> list[slice]:
        """Rows of each part."""
        step = self.rows or max(1, out_features)
        return [slice(start, min(start + step, out_features)) for start in range(0, out_features, step)]


TALL_ROWS, WIDE_COLUMNS = 16384, 8192
"""From where on parts pay: rows of the weight for halves, columns for parts of 2048 rows."""


def choose(out_features: int, in_features: int) -> Strategy:
    """The strategy that was fastest for such a shape on an H100 (`benchmarks.studies.prefill_study`)."""
    if out_features >= TALL_ROWS:
        return Strategy(-(-out_features // (2 * BLOCK_ROWS)) * BLOCK_ROWS, overlapped=True)
    if in_features >= WIDE_COLUMNS and out_features > 2048:
        return Strategy(2048, overlapped=True)
    return Strategy()


def multiply(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Tensor,
    bias: Tensor | None,
    quantizers: Sequence[UniformQuantizer],
    out_features: int,
    strategy: Strategy | None = None,
) -> Tensor:
    """`x @ w.T + bias` with a packed weight. x: [batch, in_features]; returns [batch, out_features] in its dtype.

    strategy: by default what `choose` says.
    """
    strategy = strategy or choose(out_features, x.shape[1])
    parts = strategy.parts(out_features)
    if len(parts) == 1:
        weight = x.new_empty((out_features, x.shape[1]))
        decode_rows(codes, scales, quantizers, weight, 0)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    overlapped = strategy.overlapped and x.is_cuda
    out = x.new_empty((x.shape[0], out_features))
    bias = None if bias is None else bias.to(x.dtype)
    height = max((part.stop - part.start for part in parts), default=0)
    places = x.new_empty((2 if overlapped else 1, height, x.shape[1]))
    main = torch.cuda.current_stream(x.device) if overlapped else None
    side = _side_stream(x.device) if overlapped else None
    if main is not None and side is not None:
        side.wait_stream(main)
    multiplied: list[torch.cuda.Event] = []
    for index, part in enumerate(parts):
        weight = places[index % len(places), : part.stop - part.start]
        if main is None or side is None:
            decode_rows(codes, scales, quantizers, weight, part.start)
        else:
            if index >= 2:
                side.wait_event(multiplied[index - 2])
            with torch.cuda.stream(side):
                decode_rows(codes, scales, quantizers, weight, part.start)
            main.wait_event(side.record_event())
        result = out[:, part]
        if bias is None:
            torch.mm(x, weight.T, out=result)
        else:
            torch.addmm(bias[part], x, weight.T, out=result)
        if main is not None:
            multiplied.append(main.record_event())
    return out


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which parts are decoded ahead."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
