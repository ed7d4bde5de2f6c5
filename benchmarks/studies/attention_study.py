"""Which plan of the attention of one token is fastest: `python -m benchmarks.studies.attention_study [--json FILE]`, on an NVIDIA GPU.

Heads of Llama 3.1 8B with rotary embedding, 1 and 8 sequences, caches that hold few places and many. Each plan is checked before it is
timed; behind each call the transform of the next product runs, as in a model, so that a launch may overlap the end of the one before.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.adapters import rotate_operand
from benchmarks.rows import write_rows
from benchmarks.timing import check, require_gpu, time_calls
from qpc.kernels import attention, reference
from qpc.kernels.launch import processors
from qpc.quant.rotation import Rotation
from tests.kernels.attention_cases import inputs

QUERY_HEADS, HEADS, WIDTH = 32, 8, 128
BATCHES, HELD = (1, 8), ((128, 1024), (1000, 1024), (4000, 8192))
"""Sequences; places that hold a token, and all places."""

GRID = [
    (32, 4, False),
    *((block, warps, True) for block, warps in ((32, 4), (64, 4), (128, 8))),
]
"""Places at a time, warps, whether they are read ahead."""

CLOSE = 2e-2
"""Relative error of bfloat16 with probabilities rounded to it."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = require_gpu()
    rows: list[dict[str, Any]] = []
    for batch, (held, length) in product(BATCHES, HELD):
        for row in measured(batch, held, length, device):
            print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            rows.append(row)
            write_rows(options.json, "attention_study", rows)


def measured(batch: int, held: int, length: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each plan, the default first."""
    given = inputs((batch, QUERY_HEADS, HEADS, WIDTH, length, held), True, torch.bfloat16, str(device))
    q, k, v, keys, values, position, starts, cos, sin = given
    starts.zero_()
    scale = WIDTH**-0.5
    expected = reference.decode_attention(q.double(), k, v, keys.clone(), values.clone(), position, starts, cos, sin, scale, 0)
    rotate = Rotation.random(QUERY_HEADS * WIDTH, torch.Generator().manual_seed(0)).to(device)
    out = torch.empty(batch, QUERY_HEADS * WIDTH, dtype=torch.bfloat16, device=device)
    transform = rotate_operand(out, rotate.signs, rotate.block)
    default = attention.plan(batch * HEADS, length, processors(device))
    for block, warps, ahead in GRID:
        cut = attention.Plan(min(default.splits, -(-length // block)), warps, block, ahead)
        attend = partial(attention.attend, *given, scale, 0, cut)
        proof = check(attend, expected, CLOSE)

        def call(attend: partial[Tensor] = attend) -> None:
            attend()
            transform()

        timing = time_calls([call], proof)
        yield {"batch": batch, "held": held, "splits": cut.splits, "block": block, "warps": warps, "ahead": ahead, **timing.row}


if __name__ == "__main__":
    main()
