"""The transform of the activation by itself: `python -m benchmarks transform --json FILE [--quick]`, on an NVIDIA GPU.

Each call reads and writes what lies in the cache, as in a model. Columns of a row: transform, features, block, batch, us, us_p20, us_p80,
max_rel_error. The transforms: `rotate` (signs and Hadamard), `rms_norm` (PyTorch's, alone), `rms_norm then rotate` (two launches);
`rotate_operand` and `norm_operand` write the operand of the integer multiplication, the second behind RMSNorm, in one launch each.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.adapters import OPERANDS, norm_operand, rotate_operand, rotation
from benchmarks.baselines import ROUNDING
from benchmarks.plan import Run, failure, options_of, require_all
from benchmarks.timing import EXACT, check, time_calls
from benchmarks.weights import activations
from qpc.kernels import reference
from qpc.quant.hadamard import block_size
from qpc.quant.rotation import Rotation

FEATURES, QUICK_FEATURES = (4096, 14336, 576, 1536, 2048, 8192), (4096, 14336)
BATCHES = (1, 4, 8, 16)
EPSILON = 1e-5
CALLS = 128


def main(arguments: list[str]) -> None:
    """Check and time."""
    options = options_of("transform", __doc__, arguments, budget_s=120, quick_budget_s=60)
    run = Run.begin("transform", options.json, options.budget_s)
    require_all(run.record(measure(run, QUICK_FEATURES if options.quick else FEATURES), show))


@dataclass(frozen=True)
class Transform:
    """One that is timed. expected: float64 [batch, features]; values: these, from what the call returns."""

    name: str
    call: Callable[[], Any]
    expected: Tensor
    tolerance: float = EXACT
    values: Callable[[Any], Tensor] = lambda result: result


def measure(run: Run, widths: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """One row for each transform, width and batch; a failure is a row too."""
    for features in widths:
        for batch in BATCHES:
            for each in transforms(features, batch, run.device):
                row = {"transform": each.name, "features": features, "block": block_size(features), "batch": batch}
                try:
                    proof = check(lambda each=each: each.values(each.call()), each.expected, each.tolerance)  # type: ignore[misc]
                    row |= {**time_calls([each.call], proof, min_calls=CALLS).row, "max_rel_error": proof.max_rel_error}
                except Exception as error:
                    row |= failure(error)
                yield row


def transforms(features: int, batch: int, device: torch.device) -> Iterator[Transform]:
    """All of them, for one random activation in bfloat16."""
    x = activations(batch, features, device)
    weight = (1 + 0.1 * torch.randn(features, device=device)).bfloat16()
    random = Rotation.random(features, torch.Generator().manual_seed(0)).to(device)
    signs, block = random.signs, random.block
    normed = x.double() / (x.double().square().mean(dim=1, keepdim=True) + EPSILON).sqrt() * weight.double()
    rotated, both = reference.rotate(x.double(), signs, block), reference.rotate(normed, signs, block)
    norm = partial(functional.rms_norm, x, (features,), weight, EPSILON)
    yield Transform("rotate", rotation(x, signs, block), rotated)
    yield Transform("rms_norm", norm, normed, ROUNDING)
    yield Transform("rms_norm then rotate", lambda: rotation(norm(), signs, block)(), both, ROUNDING)
    if OPERANDS:
        from qpc.kernels.operand import unpack_operand

        def values(operand: tuple[Tensor, Tensor]) -> Tensor:
            return cast(Tensor, unpack_operand(*operand, features))

        yield Transform("rotate_operand", rotate_operand(x, signs, block), rotated, values=values)
        yield Transform("norm_operand", norm_operand(x, weight, EPSILON, signs, block), both, values=values)


def show(row: dict[str, Any]) -> str:
    """One row as a line."""
    return f"{row['transform']:21} {row['features']:6} batch {row['batch']:2}  {row['us']:6.2f} us  error {row['max_rel_error']:.1e}"
