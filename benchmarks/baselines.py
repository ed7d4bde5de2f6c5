"""What the kernels are compared with, timed in the same process: PyTorch's own, and other libraries where they are installed.

Every baseline is checked against the float64 product of the weight that it holds, or of the one that it quantized, as far as its format
allows. One that is not installed is absent; one that fails says why.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.timing import Checked, Timing, check, copies_for, time_calls
from benchmarks.weights import Shape, activations, label

GROUP = 128
ROUNDING = 4e-2
"""Tolerance, as `relative_error` measures it, of a product whose weights or partial sums may be rounded to bfloat16 on the way."""

ROUNDED_WEIGHTS = 0.1
"""The same if `index * scale` is rounded to bfloat16 before the zero point is taken off: up to 0.03 of a step of the scale."""

FOUR_BITS, THREE_BITS = 0.8, 1.8
"""The same with a weight that was rounded to so many bits in groups: six or seven deviations of its error."""


@dataclass(frozen=True)
class Baseline:
    """A way to multiply. bits: nominal, of a weight. make: calls over so many different weights for activations
    bfloat16 [batch, in_features], and what the first should give, float64 [batch, out_features]. package: None if it is PyTorch's own.
    """

    name: str
    bits: int
    tolerance: float
    make: Callable[[Shape, int, Tensor], tuple[list[Callable[[], Tensor]], Tensor]]
    package: str | None = None

    @property
    def present(self) -> bool:
        return self.package is None or find_spec(self.package) is not None


def bf16_linear(shape: Shape, copies: int, x: Tensor) -> tuple[list[Callable[[], Tensor]], Tensor]:
    """`F.linear`, which is cuBLAS."""
    weights = [torch.randn(shape, dtype=torch.bfloat16, device=x.device) for _ in range(copies)]
    return [partial(functional.linear, x, weight) for weight in weights], _product(x, weights[0])


def tinygemm_int4(shape: Shape, copies: int, x: Tensor) -> tuple[list[Callable[[], Tensor]], Tensor]:
    """PyTorch's int4 product with groups of 128, whose weight is `(index - 8) * scale + zero`. Random indices: no weight is quantized."""
    out_features, in_features = shape
    calls: list[Callable[[], Tensor]] = []
    expected = torch.empty(0)
    for copy in range(copies):
        indices = torch.randint(0, 256, (out_features, in_features // 2), dtype=torch.uint8, device=x.device)
        scales = (0.5 + torch.rand(in_features // GROUP, out_features, 1, device=x.device)).bfloat16()
        scales_and_zeros = torch.cat([scales, torch.zeros_like(scales)], dim=2).contiguous()
        packed = torch.ops.aten._convert_weight_to_int4pack(indices, 8)
        calls.append(partial(torch.ops.aten._weight_int4pack_mm, x, packed, GROUP, scales_and_zeros))
        if copy == 0:
            wide = torch.stack([indices >> 4, indices & 15], dim=2).reshape(out_features, -1, GROUP).float() - 8
            expected = _product(x, (wide * scales.permute(1, 0, 2)).reshape(shape))
    return calls, expected


def gemlite_int4(shape: Shape, copies: int, x: Tensor) -> tuple[list[Callable[[], Tensor]], Tensor]:
    """GemLite (Triton) at 4 bits with groups of 128, whose weight is `(index - zero) * scale`."""
    from gemlite.core import DType, GemLiteLinear  # type: ignore[import-not-found]

    out_features, in_features = shape
    calls: list[Callable[[], Tensor]] = []
    expected = torch.empty(0)
    for copy in range(copies):
        indices = torch.randint(0, 16, shape, dtype=torch.uint8, device=x.device)
        scales = (0.5 + torch.rand(out_features * in_features // GROUP, 1, device=x.device)).bfloat16()
        layer = GemLiteLinear(
            4, group_size=GROUP, in_features=in_features, out_features=out_features, input_dtype=DType.BF16, output_dtype=DType.BF16
        )
        layer.pack(indices, scales, torch.full_like(scales, 8), None)
        calls.append(partial(layer, x))
        if copy == 0:
            expected = _product(x, ((indices.reshape(-1, GROUP).float() - 8) * scales.float()).reshape(shape))
    return calls, expected


def humming(bits: int, shape: Shape, copies: int, x: Tensor) -> tuple[list[Callable[[], Tensor]], Tensor]:
    """Humming at some bits with groups of 128."""
    from humming.layer import HummingLayer  # type: ignore[import-not-found]

    calls: list[Callable[[], Tensor]] = []
    expected = torch.empty(0)
    for copy in range(copies):
        weight = torch.randn(shape, dtype=torch.bfloat16, device=x.device)
        layer = HummingLayer(
            shape_n=shape[0], shape_k=shape[1], weight_config={"dtype": f"int{bits}", "group_size": GROUP}, torch_dtype=torch.bfloat16
        ).to(x.device)
        layer.load_from_unquantized(weight)
        layer.transform()
        calls.append(partial(layer, x))
        if copy == 0:
            expected = _product(x, weight)
    return calls, expected


def bitsandbytes_nf4(shape: Shape, copies: int, x: Tensor) -> tuple[list[Callable[[], Tensor]], Tensor]:
    """bitsandbytes at NormalFloat 4 with its default groups of 64."""
    from bitsandbytes.nn import LinearNF4  # type: ignore[import-not-found]

    calls: list[Callable[[], Tensor]] = []
    expected = torch.empty(0)
    for copy in range(copies):
        plain = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16)
        layer = LinearNF4(shape[1], shape[0], bias=False, compute_dtype=torch.bfloat16)
        layer.load_state_dict(plain.state_dict())
        calls.append(partial(layer.to(x.device), x))
        if copy == 0:
            expected = _product(x, plain.weight.detach().to(x.device))
    return calls, expected


BF16 = Baseline("bf16", 16, ROUNDING, bf16_linear)
INT4 = Baseline("int4", 4, ROUNDING, tinygemm_int4)
OTHERS = (
    Baseline("gemlite_int4", 4, ROUNDED_WEIGHTS, gemlite_int4, "gemlite"),
    Baseline("humming_int3", 3, THREE_BITS, partial(humming, 3), "humming"),
    Baseline("humming_int4", 4, FOUR_BITS, partial(humming, 4), "humming"),
    Baseline("bitsandbytes_nf4", 4, FOUR_BITS, bitsandbytes_nf4, "bitsandbytes"),
)


@cache
def time_baseline(baseline: Baseline, shape: Shape, batch: int, device: torch.device, min_calls: int = 16) -> tuple[Timing, Checked]:
    """Check and time one baseline; the second call with the same arguments remembers. Raises what the library raises."""
    x = activations(batch, shape[1], device)
    calls, expected = baseline.make(shape, copies_for(shape[0] * shape[1] * baseline.bits // 8), x)
    proof = check(calls[0], expected, baseline.tolerance)
    return time_calls(calls, proof, min_calls=min_calls), proof


def baseline_columns(shape: Shape, batch: int, device: torch.device, baselines: Sequence[Baseline]) -> dict[str, Any]:
    """Columns `NAME_us` of all baselines that are here; `NAME_error` in its place where one failed, None where PyTorch's int4 did."""
    return dict(_columns(shape, batch, device, baselines))


def _columns(shape: Shape, batch: int, device: torch.device, baselines: Sequence[Baseline]) -> Iterator[tuple[str, Any]]:
    for baseline in baselines:
        if not baseline.present:
            continue
        try:
            yield f"{baseline.name}_us", round(time_baseline(baseline, shape, batch, device)[0].us, 3)
        except Exception as error:
            if baseline is BF16:
                raise
            yield f"{baseline.name}_us", None
            yield f"{baseline.name}_error", f"{type(error).__name__}: {str(error)[:200]} ({label(shape)}, batch {batch})"


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() @ weight.double().T
