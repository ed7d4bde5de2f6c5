"""Speed of the trellis encoders: `python -m benchmarks encode --json FILE`.

Gaussian weights, both passes of the tail-biting search counted, tables of neighbours made before the clock starts. Rows with feedback round
the columns of one wide weight in sequence, which is how a calibrated layer is coded.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import machine, write_rows
from qpc.kernels.encoder import encoder_for
from qpc.quant.feedback import Feedback, RowFeedback
from qpc.quant.moment import Moment
from qpc.quant.palette import Effort
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
        for feedback in (False, True):
            speed = weights_per_s(quantizer, device, feedback, seconds)
            what = {"preset": preset, "window_bits": quantizer.window_bits, "rate": quantizer.step_bits / 2, "feedback": feedback}
            yield {**what, "device": machine(device), "weights_per_s": round(speed)}


def weights_per_s(quantizer: TrellisQuantizer, device: torch.device, feedback: bool, seconds: float) -> float:
    """Weights coded in a second, on as many as fill the machine for about `seconds`."""
    encoder = encoder_for(device)
    rows = 64 * (2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8)
    carry = None
    if feedback:
        inputs = torch.randn(4 * FEEDBACK_COLUMNS, FEEDBACK_COLUMNS, device=device)
        carry = RowFeedback(((rows, Feedback.of(Moment(inputs.T @ inputs, len(inputs)))),))

    def run(columns: int) -> float:
        weight = torch.randn(rows, columns, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        start_s = time.perf_counter()
        quantizer.quantize(weight, encoder, carry)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return rows * columns / (time.perf_counter() - start_s)

    if feedback:
        return run(FEEDBACK_COLUMNS)
    run(16)
    blocks = int(run(16) * seconds / (16 * rows))
    return run(16 * max(1, min(blocks, 512)))
