"""What it is worth to choose groups and quantizers together: `python -m benchmarks fusion --gpu h100 --json FILE --plot FILE`, on a CPU.

The shapes of Llama-3.1-8B, the default palette, and the sensitivities that `benchmarks.allocation` draws; the times of a GPU are a latency
table, or a roofline that counts bytes alone, which no kernel can beat. For limits on the time of all linears the least predicted loss of

    aware    groups and quantizers chosen together
    blind    linears run one by one
    after    quantizers chosen as if linears ran one by one, then those of one input that happen to agree fused; of all the limits that the
             choice might be given, the one that ends within the time at the least loss
    tied     linears of one input always have one quantizer, and are fused

Columns of a row: batch, share (of the least time of blind), latency_us (the limit), and for each of them NAME (loss; null if it cannot keep
the limit), NAME_bits, NAME_us (the time reached), NAME_launches; gap (of aware). Every time is kept to the picosecond.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.allocation import GROUPS, MODELS, Model, sensitivities_of
from benchmarks.rows import BenchmarkError, machine, write_rows
from qpc.cost import Weight
from qpc.errors import BudgetError, ProfileError
from qpc.ir.annotation import FusionGroup, LinearShape, LinearSite
from qpc.latency import LatencyModel, Roofline, latency_of
from qpc.passes.allocate import TIMED_GAP
from qpc.passes.timed_items import Timing
from qpc.quant.palette import default_palette
from qpc.solver import Allocation, Item, Limits, Resource, Rules, solve

LLAMA = MODELS[0]
BATCHES = (1, 8)
SHARES = (0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5)
"""Limits, over the least time of linears one by one."""

STEPS = 64
"""Limits that `after` tries, besides those of the rows."""

NAMES = ("aware", "blind", "after", "tied")


def main(arguments: list[str]) -> None:
    """Solve, print a line for each limit, write and draw."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks fusion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", default="h100", help="a known GPU, or the file of a latency table")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rows")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    try:
        model = bytes_alone(latency_of(options.gpu))
    except ProfileError as error:
        raise BenchmarkError(str(error)) from error
    rows = []
    for batch in BATCHES:
        for row in measure(Subject.of(LLAMA, options.seed), Timing(model, batch)):
            rows.append(row)
            losses = "  ".join(f"{name} {row[name]:.4g}" if row[name] is not None else f"{name} -" for name in NAMES)
            print(f"batch {batch}  {row['latency_us']:7.1f} us  {losses}", flush=True)
    head = {"model": LLAMA.name, "gpu": title_of(model), "machine": machine(torch.device("cpu"))}
    write_rows(options.json, "fusion", rows, head)
    if options.plot is not None:
        draw(rows, head["gpu"], options.plot)


def bytes_alone(model: LatencyModel) -> LatencyModel:
    """A roofline without its throughput of decoding, which is that of one kernel; a table as it is."""
    return replace(model, decoded_per_s=None) if isinstance(model, Roofline) else model


def title_of(model: LatencyModel) -> str:
    """What the times are."""
    return f"{model.title} of bytes alone" if isinstance(model, Roofline) else model.title


@dataclass(frozen=True)
class Subject:
    """A model to allocate: each linear with its group, and its weight."""

    places: tuple[tuple[LinearSite, FusionGroup], ...]
    weights: dict[str, Weight]

    @staticmethod
    def of(model: Model, seed: int) -> "Subject":
        """With sensitivities drawn as in `benchmarks.allocation`; linears may stay in bfloat16."""
        places, weights = [], {}
        for layer, sensitivity in enumerate(sensitivities_of(model, seed)):
            for members in GROUPS:
                shapes = tuple(LinearShape(*model.linears[name]) for name in members)
                names = tuple(f"layers.{layer}.{name}" for name in members)
                group = FusionGroup(names, f"input of {names[0]}", shapes)
                for member, name, shape in zip(members, names, shapes, strict=True):
                    places.append((LinearSite(name, name, shape), group))
                    weights[name] = Weight(shape, sensitivity[member], 2 * shape.weights)
        return Subject(tuple(places), weights)

    def items(self, timing: Timing, fuse: bool) -> list[Item]:
        """With the whole palette."""
        return timing.items(self.places, self.weights, default_palette().quantizers, tied=True, fuse=fuse)

    @property
    def count(self) -> int:
        """Weights."""
        return sum(weight.shape.weights for weight in self.weights.values())


def measure(subject: Subject, timing: Timing) -> Iterator[dict[str, Any]]:
    """A row for each limit."""
    together, apart = subject.items(timing, fuse=True), subject.items(timing, fuse=False)
    alike = Rules(alike=[group.members for _, group in subject.places])
    least_ps = solve(apart, Limits(), objective=Resource.LATENCY).cost.latency_ps
    limits_ps = [math.ceil(least_ps * share) for share in (*SHARES, *spread(1.0, 1.4 * SHARES[-1]))]
    tried = list(fused_afterwards(together, apart, limits_ps))
    for share in SHARES:
        limit_ps = int(least_ps * share)
        kept = [each for each in tried if each.cost.latency_ps <= limit_ps]
        found = {
            "aware": within(together, limit_ps, Rules()),
            "blind": within(apart, limit_ps, Rules()),
            "after": min(kept, key=lambda each: each.cost.distortion, default=None),
            "tied": within(together, limit_ps, alike),
        }
        row: dict[str, Any] = {"batch": timing.batch, "share": share, "latency_us": limit_ps / 1e6}
        for name, each in found.items():
            assert each is None or each.cost.latency_ps <= limit_ps, "the limit is kept"
            row[name] = None if each is None else each.cost.distortion
            row[f"{name}_bits"] = None if each is None else 8 * each.cost.weight_bytes / subject.count
            row[f"{name}_us"] = None if each is None else each.cost.latency_ps / 1e6
            row[f"{name}_launches"] = None if each is None else len(each.groups)
        yield row | {"gap": None if found["aware"] is None else found["aware"].gap}


def within(items: Sequence[Item], limit_ps: int, rules: Rules) -> Allocation | None:
    """The least loss in a time; None if nothing is so fast."""
    try:
        return solve(items, Limits(latency_ps=limit_ps), rules=rules, relative_gap=TIMED_GAP)
    except BudgetError:
        return None


def fused_afterwards(together: Sequence[Item], apart: Sequence[Item], limits_ps: Sequence[int]) -> Iterator[Allocation]:
    """Allocations without groups within some limits, whose linears of one quantizer are then fused as is fastest."""
    for limit_ps in limits_ps:
        if (chosen := within(apart, limit_ps, Rules())) is not None:
            rules = Rules(allowed={site: (quantizer,) for site, quantizer in chosen.choices.items()})
            yield solve(together, Limits(), objective=Resource.LATENCY, rules=rules)


def spread(first: float, last: float) -> list[float]:
    """From first to last, each the same factor above the one before."""
    return [first * (last / first) ** (step / (STEPS - 1)) for step in range(STEPS)]


def draw(rows: Sequence[dict[str, Any]], gpu: str, path: Path) -> None:
    """Loss against time, a picture for each batch."""
    from matplotlib.figure import Figure

    labels = {
        "blind": ("linears one by one", "#8d8d8d", "s--"),
        "after": ("the same, fused where they agree", "#78a9ff", "^-"),
        "tied": ("one quantizer for all of an input", "#da1e28", "v:"),
        "aware": ("groups and quantizers together", "#0f62fe", "o-"),
    }
    batches = sorted({row["batch"] for row in rows})
    figure = Figure(figsize=(5.4 * len(batches), 4.2), layout="constrained")
    for axes, batch in zip(figure.subplots(1, len(batches), sharey=True, squeeze=False)[0], batches, strict=True):
        for name, (label, colour, style) in labels.items():
            points = [(row["latency_us"] / 1000, row[name]) for row in rows if row["batch"] == batch and row[name] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=colour, markersize=4, linewidth=1.6, label=label)
        axes.set(yscale="log", xlabel=f"time of all linears at batch {batch}, ms")
        axes.set_title(f"Llama-3.1-8B, {gpu}", loc="left", fontsize=9.5)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("predicted loss, drawn sensitivities")
    figure.axes[0].legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
