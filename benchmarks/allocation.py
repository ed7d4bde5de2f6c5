"""Time and gap of the solver on the shapes of whole models: every legal group, 80 quantizers, limits of bytes and of time.

Sensitivities are drawn (log-normal, deviation 1.2, the values more sensitive than queries and keys); losses follow ideal quantizers 0.4 dB
off the bound; latencies are a roofline: bytes over the memory's speed, and for each launch and each transform a fixed time. The latency
limit is a share of what all linears take at the rate of the byte limit, every group fused. "blind" is the loss when no group may be fused
at the same limits, if that is possible; the Gaussian bound and the palette's are for the byte limit alone.
"""

import argparse
import itertools
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import scipy
import torch
from torch import Tensor

from benchmarks.rows import machine, write_rows
from qpc.cost import Choice, Cost
from qpc.errors import BudgetError
from qpc.quant.quantizer import RingEncoder, UniformQuantizer
from qpc.solver import Item, Limits, Rules, decibels, palette_bound, solve, water_filling

LAUNCH_PS, TRANSFORM_PS = 3_000_000, 2_000_000
BYTES_PER_S = 3.35e12
SHARE_OF_SPEED = 0.85
STEPS = 80


@dataclass(frozen=True)
class Model:
    """Shapes of a decoder."""

    name: str
    layers: int
    hidden: int
    keys: int
    inner: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """[out_features, in_features] of each linear of a layer."""
        h, k, f = self.hidden, self.keys, self.inner
        return {"q": (h, h), "k": (k, h), "v": (k, h), "o": (h, h), "gate": (f, h), "up": (f, h), "down": (h, f)}


MODELS = (Model("Llama-3.1-8B", 32, 4096, 1024, 14336), Model("Llama-3.1-405B", 126, 16384, 1024, 53248))
CASES: tuple[tuple[float, float | None, int | None], ...] = (
    *((bits, share, None) for bits in (2.5, 3.25, 4.5) for share in (None, 0.95, 1.0, 1.05)),
    *((3.25, share, most) for share in (None, 1.0) for most in (4, 8, 16)),
)
"""Bits per weight, share of the time, and how many distinct quantizers."""

GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


@dataclass(frozen=True)
class Step(UniformQuantizer):
    """A rate, from 1 to 8 bits, and what it would leave of a Gaussian; it codes nothing."""

    family: ClassVar[str] = "step"
    index: int

    @property
    def rate(self) -> Fraction:
        """Bits per weight."""
        return 1 + Fraction(7 * self.index, STEPS - 1)

    @property
    def distortion(self) -> float:
        """0.4 dB over the bound."""
        return float(10**0.04 * 2.0 ** (-2 * float(self.rate)))

    @property
    def block_words(self) -> int:
        """Never asked for."""
        raise NotImplementedError

    def encode(self, unit: Tensor, encoder: RingEncoder | None = None) -> Tensor:
        """Never called."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """Never called."""
        raise NotImplementedError


QUANTIZERS = tuple(Step(index) for index in range(STEPS))


def main(arguments: list[str]) -> None:
    """Solve, print a line for each limit, write the file."""
    parser = argparse.ArgumentParser("python -m benchmarks allocation", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--gap", type=float, default=5e-4, help="relative gap at which the solver may stop")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    rows = []
    for model in MODELS:
        for row in measure(model, options.gap, options.seed):
            rows.append(row)
            print(
                "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()), flush=True
            )
    write_rows(options.json, "allocation", rows, {"scipy": scipy.__version__, "machine": machine(torch.device("cpu"))})


def measure(model: Model, gap: float, seed: int) -> Iterator[dict[str, Any]]:
    """A row for each case."""
    started_s = time.perf_counter()
    items = items_of(model, seed)
    singles = [item for item in items if len(item.sites) == 1]
    built_s = time.perf_counter() - started_s
    weights = [out * into for _ in range(model.layers) for out, into in model.linears.values()]
    sensitivities = [item.choices[0].cost.distortion / QUANTIZERS[0].distortion for item in singles]
    for bits, share, most_quantizers in CASES:
        size = int(bits * sum(weights) / 8)
        fused_ps = size / (BYTES_PER_S * SHARE_OF_SPEED) * 1e12 + model.layers * len(GROUPS) * (LAUNCH_PS + TRANSFORM_PS)
        limits = Limits(size, None if share is None else int(share * fused_ps))
        wall_s, process_s = time.perf_counter(), time.process_time()
        found = solve(items, limits, rules=Rules(most_quantizers=most_quantizers), relative_gap=gap)
        wall_s, process_s = time.perf_counter() - wall_s, time.process_time() - process_s
        assert found.cost.weight_bytes <= size, "the limit of bytes is kept"
        assert limits.latency_ps is None or found.cost.latency_ps <= limits.latency_ps, "the limit of time is kept"
        blind = None if share is None or most_quantizers is not None else loss_unfused(singles, limits, gap)
        palette = palette_bound([[choice.cost for choice in item.choices] for item in singles], size)
        ideal = water_filling(sensitivities, weights, 8 * size).loss
        yield {
            "model": model.name,
            "bits": bits,
            "latency_share": share,
            "most_quantizers": most_quantizers,
            "items": len(items),
            "build_s": built_s,
            "wall_s": wall_s,
            "process_s": process_s,
            "gap": found.gap,
            "status": str(found.status),
            "loss": found.cost.distortion,
            "blind": blind,
            "launches": len(found.groups),
            "quantizers": len(set(found.choices.values())),
            "over_palette_db": decibels(found.cost.distortion, palette),
            "over_gaussian_db": decibels(found.cost.distortion, ideal),
        }


def sensitivities_of(model: Model, seed: int) -> Iterator[dict[str, float]]:
    """Of the linears of each layer [nats]."""
    rng = random.Random(seed)
    scale = {"q": 0.3, "k": 0.3, "v": 3.0}
    for _ in range(model.layers):
        yield {name: scale.get(name, 1.0) * math.exp(rng.gauss(0, 1.2)) * 0.05 / model.layers for name in model.linears}


def items_of(model: Model, seed: int) -> list[Item]:
    """Every linear, and every subset of a group, with all quantizers."""
    items = []
    for layer, sensitivity in enumerate(sensitivities_of(model, seed)):
        for group in GROUPS:
            for count in range(1, len(group) + 1):
                for subset in itertools.combinations(group, count):
                    shapes = [model.linears[name] for name in subset]
                    table = tuple(
                        Choice(quantizer, cost(shapes, [sensitivity[name] for name in subset], quantizer)) for quantizer in QUANTIZERS
                    )
                    items.append(Item(tuple(f"layers.{layer}.{name}" for name in subset), table))
    return items


def cost(shapes: list[tuple[int, int]], sensitivities: list[float], quantizer: Step) -> Cost:
    """Bytes, loss and roofline of linears that run as one."""
    size = sum(math.ceil(out * into * quantizer.rate / 8) + 2 * out + into // 8 for out, into in shapes)
    latency_ps = int(size / (BYTES_PER_S * SHARE_OF_SPEED) * 1e12) + LAUNCH_PS + TRANSFORM_PS
    return Cost(size, sum(sensitivities) * quantizer.distortion, latency_ps)


def loss_unfused(singles: list[Item], limits: Limits, gap: float) -> float | None:
    """The loss without groups at the same limits; None if they cannot be kept."""
    try:
        return solve(singles, limits, relative_gap=gap).cost.distortion
    except BudgetError:
        return None
