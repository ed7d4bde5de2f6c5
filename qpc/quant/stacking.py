"""Weights that are quantized together: rows are independent of each other, so many of them keep a parallel encoder busy."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from qpc.quant.feedback import Feedback, StackFeedback
from qpc.quant.layout import BLOCK_ROWS, row_blocks
from qpc.quant.quantizer import PackedWeight, Quantizer, RingEncoder
from qpc.quant.rounding import RowFeedback


def quantize_stacked(
    quantizer: Quantizer,
    weights: Sequence[Tensor],
    encoder: RingEncoder | None = None,
    feedbacks: Sequence[Feedback | StackFeedback | None] | None = None,
) -> list[PackedWeight]:
    """Quantize rotated weights [out_features_i, in_features] by one quantizer: as `Quantizer.quantize`, one by one.

    feedbacks: of each weight, for all or for none.
    """
    padded = list(weights)
    if len(weights) > 1:
        padded = [functional.pad(weight, (0, 0, 0, -len(weight) % BLOCK_ROWS)) for weight in weights]
    feedback = None
    if feedbacks is not None and feedbacks[0] is not None:
        assert all(each is not None for each in feedbacks), "feedback for all or for none"
        feedback = RowFeedback(tuple(part for rows, each in zip(padded, feedbacks, strict=True) for part in _by_rows(len(rows), each)))
    whole = quantizer.quantize(torch.cat(padded) if len(padded) > 1 else padded[0], encoder, feedback)
    made, start = [], 0
    for weight in weights:
        stop = start + row_blocks(len(weight))
        codes = tuple(part[start:stop].clone() for part in whole.codes)
        scales = whole.scales[start * BLOCK_ROWS : stop * BLOCK_ROWS].clone()
        made.append(replace(whole, out_features=len(weight), codes=codes, scales=scales))
        start = stop
    return made


def _by_rows(rows: int, feedback: Feedback | StackFeedback | None) -> list[tuple[int, Feedback]]:
    """Of a weight with so many rows: how many of them have which feedback."""
    if isinstance(feedback, StackFeedback):
        return [(rows // len(feedback.parts), part) for part in feedback.parts]
    return [] if feedback is None else [(rows, feedback)]
