"""Speed of the trellis encoders: `python -m benchmarks encode --json FILE`.

Gaussian weights, both passes of the tail-biting search counted, tables of neighbours made before the clock starts. Rows with feedback round
the columns of one wide weight in sequence, which is how a calibrated layer is coded; where that would take long, fewer of them.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import machine, write_rows
from qpc.kernels.encoder import encoder_for
from qpc.quant.feedback import Feedback
from qpc.quant.layout import BLOCK_COLUMNS, BLOCK_ROWS
from qpc.quant.moment import Moment
from qpc.quant.palette import Effort
from qpc.quant.rounding import RowFeedback
from qpc.quant.trellis import TrellisQuantizer

STEP_BITS = (3, 4, 5, 6, 7, 8, 9, 10)
FEEDBACK_COLUMNS = 512


def main(arguments: list[str]) -> None:
    """Measure, print a line per row, write the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks encode", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--efforts", nargs="+", default=["fast", "default", "high", "max"])
    parser.add_argument("--seconds", type=float, default=1.0, help="time to spend on one row, about")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for row in _rows([Effort.parse(name) for name in options.efforts], device, options.seconds):
        what = f"{row['preset']:8} L={row['window_bits']:<3} {row['rate']:<4} bit {'feedback' if row['feedback'] else '':9}"
        print(f"{what}{row['weights_per_s'] / 1e6:8.2f} M weights/s", flush=True)
        rows.append(row)
        write_rows(options.json, "encode", rows)


def _rows(efforts: list[Effort], device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    jobs = [("L=16", TrellisQuantizer(step_bits, 16)) for step_bits in (4, 6, 8)]
    jobs += [(str(effort), effort.trellis(step_bits)) for effort in efforts for step_bits in STEP_BITS]
    for preset, quantizer in jobs:
        speed = 0.0
        for feedback in (False, True):
            speed = sequential_weights_per_s(quantizer, device, seconds, speed) if feedback else weights_per_s(quantizer, device, seconds)
            what = {"preset": preset, "window_bits": quantizer.window_bits, "rate": quantizer.step_bits / 2, "feedback": feedback}
            yield {**what, "device": machine(device), "weights_per_s": round(speed)}


def weights_per_s(quantizer: TrellisQuantizer, device: torch.device, seconds: float) -> float:
    """Weights coded in a second, on as many as fill the machine for about `seconds`."""
    _run(quantizer, device, BLOCK_COLUMNS, None)
    blocks = int(_run(quantizer, device, BLOCK_COLUMNS, None) * seconds / (BLOCK_COLUMNS * _rows_of(device)))
    return _run(quantizer, device, BLOCK_COLUMNS * max(1, min(blocks, 512)), None)


def sequential_weights_per_s(quantizer: TrellisQuantizer, device: torch.device, seconds: float, expected: float) -> float:
    """The same with error feedback, which codes one block of columns after the other.

    expected: weights in a second without feedback; where it is low, there are fewer columns, so that it takes about four times `seconds`.
    """
    columns = int(4 * seconds * expected / _rows_of(device)) // BLOCK_COLUMNS * BLOCK_COLUMNS
    columns = max(4 * BLOCK_COLUMNS, min(columns, FEEDBACK_COLUMNS))
    inputs = torch.randn(4 * columns, columns, device=device)
    feedback = Feedback.of(Moment(inputs.T @ inputs, len(inputs)))
    return _run(quantizer, device, columns, RowFeedback(((_rows_of(device), feedback),)))


def _run(quantizer: TrellisQuantizer, device: torch.device, columns: int, carry: RowFeedback | None) -> float:
    """Weights coded in a second in one run over a weight of so many columns."""
    weight = torch.randn(_rows_of(device), columns, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    start_s = time.perf_counter()
    quantizer.quantize(weight, encoder_for(device), carry)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return weight.numel() / (time.perf_counter() - start_s)


def _rows_of(device: torch.device) -> int:
    """Rows of two rings for each multiprocessor of a GPU, or of eight rings."""
    return BLOCK_ROWS * (2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8)
