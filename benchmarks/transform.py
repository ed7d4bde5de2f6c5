"""The transform of the activation by itself: `python -m benchmarks transform --json FILE [--quick]`, on an NVIDIA GPU.

Each call reads and writes what lies in the cache, as in a model. Columns of a row: transform, features, block, batch, us, us_p20, us_p80,
max_rel_error. The transforms: `rotate` (signs and Hadamard), `rms_norm` (PyTorch's, alone), `rms_norm then rotate` (two launches);
`triton rms_norm` and `triton add, rms_norm` are a plain kernel alone, the second with a residual added first. `rotate_operand`,
`norm_operand` and `add_norm_operand` write the operand of the integer multiplication, the last two behind what these two do, in one
launch each where there is a kernel for it. Their launch may overlap the end of the one before, as in a model. `triton silu` is a plain
kernel that multiplies SiLU of one half of a row by the other, `triton silu then rotate_operand` that and another launch; `gated_operand`
is one launch for both.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.adapters import add_norm_operand, gated_operand, norm_operand, rotate_operand, rotation
from benchmarks.baselines import ROUNDING
from benchmarks.plan import Run, failure, options_of, require_all
from benchmarks.rms_norm import rms_norm
from benchmarks.silu import silu
from benchmarks.timing import EXACT, check, time_calls
from benchmarks.weights import activations
from qpc.kernels import reference
from qpc.kernels.gate import Activation
from qpc.kernels.operand import unpack_rows
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
    residual = torch.randn_like(x)
    weight = (1 + 0.1 * torch.randn(features, device=device)).bfloat16()
    random = Rotation.random(features, torch.Generator().manual_seed(0)).to(device)
    signs, block = random.signs, random.block
    normed, added = (reference.rms_norm(value, weight, EPSILON, 0.0) for value in (x, x + residual))
    rotated, both, all_three = (reference.rotate(value, signs, block) for value in (x.double(), normed, added))
    norm = partial(functional.rms_norm, x, (features,), weight, EPSILON)
    yield Transform("rotate", rotation(x, signs, block), rotated)
    yield Transform("rms_norm", norm, normed, ROUNDING)
    yield Transform("rms_norm then rotate", lambda: rotation(norm(), signs, block)(), both, ROUNDING)
    yield Transform("triton rms_norm", partial(rms_norm, x, None, weight, EPSILON), normed, values=_first)
    yield Transform("triton add, rms_norm", partial(rms_norm, x, residual, weight, EPSILON), added, values=_first)
    values = partial(_rows, features)
    gate, up = activations(batch, 2 * features, device).chunk(2, 1)
    product = reference.gated(gate, up, Activation.SILU)
    turned = reference.rotate(product.double(), signs, block)
    yield Transform("triton silu", partial(silu, gate, up), product.double(), ROUNDING)
    yield Transform("triton silu then rotate_operand", lambda: rotate_operand(silu(gate, up), signs, block)(), turned, values=values)
    yield Transform("gated_operand", gated_operand(gate, up, Activation.SILU, signs, block), turned, values=values)
    yield Transform("rotate_operand", rotate_operand(x, signs, block), rotated, values=values)
    yield Transform("norm_operand", norm_operand(x, weight, EPSILON, signs, block), both, values=values)
    yield Transform("add_norm_operand", add_norm_operand(x, residual, weight, EPSILON, signs, block), all_three, values=values)


def _first(results: tuple[Tensor, ...]) -> Tensor:
    return results[0]


def _rows(features: int, results: tuple[Tensor, ...]) -> Tensor:
    """What an operand holds: float64 [batch, features]."""
    return unpack_rows(*results[:2])[:, :features]


def show(row: dict[str, Any]) -> str:
    """One row as a line."""
    return f"{row['transform']:31} {row['features']:6} batch {row['batch']:2}  {row['us']:6.2f} us  error {row['max_rel_error']:.1e}"
