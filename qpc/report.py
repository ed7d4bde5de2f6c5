"""What a compile decided, layer by layer, as a value that JSON and a terminal can hold."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qpc.errors import CheckpointError
from qpc.ir.sketch import Block


@dataclass(frozen=True)
class ReportRow:
    """One linear layer, embedding or output head.

    quantizer: None if the layer stays as it is; `reason` then says why.
    bits: stored bits per weight, scales and padding included.
    distortion: relative squared error of the weight. sensitivity: nats of KL per unit of it, if the error is white.
    remaining: share of the error at the output that error feedback left; None without feedback.
    group: names of the linears that it was fused with, itself included; a single linear is a group of one.
    budgeted: whether it counts for a budget in bits per weight; embeddings and output heads have a rate of their own and do not. Tied ones
        are one row, under the name of the embedding.
    latency_s: predicted time in one step, of what runs as one with others its share by weights; these add up to that of the report.
    latency_before_s: the same for the linear as it was given, by itself. Both None if no GPU was named.
    """

    name: str
    out_features: int
    in_features: int
    quantizer: str | None
    bits: float
    weight_bytes: int
    distortion: float | None
    sensitivity: float | None
    remaining: float | None
    group: tuple[str, ...]
    reason: str | None
    budgeted: bool = True
    latency_s: float | None = None
    latency_before_s: float | None = None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Report:
    """The whole model.

    budget, effort, seed: what was asked for, as text. calibration: the inputs behind error feedback, in words, or None.
    model_bytes_before, model_bytes: all parameters, as given and as stored.
    predicted_loss: nats of KL per token that the sensitivities predict. solver_gap: relative distance to the proven optimum.
    gpu, batch, latency_s: predicted time of the linears that may be quantized in one step of so many sequences, and where; None if no GPU
        was named. The rest of the model is not in it.
    block: one of the blocks that the model repeats, before it was lowered and after; None if there is none.
    """

    rows: tuple[ReportRow, ...]
    remarks: tuple[str, ...]
    budget: str
    seed: int
    effort: str
    calibration: str | None
    model_bytes: int
    model_bytes_before: int
    predicted_loss: float | None
    solver_gap: float | None
    gpu: str | None = None
    batch: int | None = None
    latency_s: float | None = None
    block: Block | None = None

    @property
    def quantized(self) -> tuple[ReportRow, ...]:
        """The rows that have a quantizer."""
        return tuple(row for row in self.rows if row.quantizer is not None)

    @property
    def linear_weights(self) -> int:
        """Weights of the quantized linears that the budget counts."""
        return sum(row.weights for row in self.quantized if row.budgeted)

    @property
    def linear_bytes(self) -> int:
        """Stored bytes of these linears, with everything that belongs to them."""
        return sum(row.weight_bytes for row in self.quantized if row.budgeted)

    @property
    def embedding_bytes(self) -> int:
        """Stored bytes of the quantized embeddings and output heads."""
        return sum(row.weight_bytes for row in self.quantized if not row.budgeted)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of these linears; 0 if there is none."""
        return 8 * self.linear_bytes / self.linear_weights if self.linear_weights else 0.0

    def to_json(self) -> dict[str, Any]:
        """A value that `json.dumps` takes and `from_json` gives back unchanged."""
        value = asdict(self)
        value["rows"] = [row | {"group": list(row["group"])} for row in value["rows"]]
        value["remarks"] = list(self.remarks)
        return value

    @staticmethod
    def from_json(value: object) -> "Report":
        """The inverse of `to_json`; `LATER_FIELDS` and `LATER_ROW_FIELDS` may be missing, as in earlier reports.

        Raises `CheckpointError` for another missing field, and for an unknown or ill-typed one.
        """
        entries = checked(value, REPORT_FIELDS, "report", LATER_FIELDS)
        rows = []
        for index, entry in enumerate(entries["rows"]):
            row = checked(entry, ROW_FIELDS, f"report.rows[{index}]", LATER_ROW_FIELDS)
            rows.append(ReportRow(**row | {"group": strings(row["group"], f"report.rows[{index}].group")}))
        block = None if entries["block"] is None else Block.from_json(entries["block"])
        return Report(**entries | {"rows": tuple(rows), "remarks": strings(entries["remarks"], "report.remarks"), "block": block})


NUMBER = (int, float)
NONE = type(None)
ROW_FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "out_features": (int,),
    "in_features": (int,),
    "quantizer": (str, NONE),
    "bits": NUMBER,
    "weight_bytes": (int,),
    "distortion": (*NUMBER, NONE),
    "sensitivity": (*NUMBER, NONE),
    "remaining": (*NUMBER, NONE),
    "group": (list,),
    "reason": (str, NONE),
    "budgeted": (bool,),
    "latency_s": (*NUMBER, NONE),
    "latency_before_s": (*NUMBER, NONE),
}
REPORT_FIELDS: dict[str, tuple[type, ...]] = {
    "rows": (list,),
    "remarks": (list,),
    "budget": (str,),
    "seed": (int,),
    "effort": (str,),
    "calibration": (str, NONE),
    "model_bytes": (int,),
    "model_bytes_before": (int,),
    "predicted_loss": (*NUMBER, NONE),
    "solver_gap": (*NUMBER, NONE),
    "gpu": (str, NONE),
    "batch": (int, NONE),
    "latency_s": (*NUMBER, NONE),
    "block": (dict, NONE),
}
LATER_FIELDS = ("gpu", "batch", "latency_s", "block")
LATER_ROW_FIELDS = ("latency_s", "latency_before_s")
"""Fields that earlier reports do not have."""
assert list(ROW_FIELDS) == [field.name for field in fields(ReportRow)]
assert list(REPORT_FIELDS) == [field.name for field in fields(Report)]


def checked(value: object, expected: Mapping[str, tuple[type, ...]], where: str, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """`value` as a dict of exactly the expected fields and types; optional ones are None where they lack. Raises `CheckpointError`."""
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must be an object, got {type(value).__name__}")
    value = dict.fromkeys(optional) | value
    for name in expected:
        if name not in value:
            raise CheckpointError(f"{where} lacks {name!r}")
    for name, entry in value.items():
        if name not in expected:
            raise CheckpointError(f"{where} has an unknown field {name!r}; known: {', '.join(expected)}")
        if not isinstance(entry, expected[name]) or (isinstance(entry, bool) and bool not in expected[name]):
            raise CheckpointError(f"{where}.{name} must be {' or '.join(kind.__name__ for kind in expected[name])}, got {entry!r}")
    return value


def strings(value: list[Any], where: str) -> tuple[str, ...]:
    """A list of strings as a tuple. Raises `CheckpointError` if one is none."""
    for index, entry in enumerate(value):
        if not isinstance(entry, str):
            raise CheckpointError(f"{where}[{index}] must be str, got {entry!r}")
    return tuple(value)


@dataclass(frozen=True)
class Place:
    """Where a linear stands in the repeated structure of a model.

    "model.layers.3.mlp.experts.7.w1" stands in the stack "model.layers", in layer 3, in the column "mlp.experts.*.w1".
    A name without a number has no layer and is a column of its own.
    """

    stack: str
    layer: int | None
    column: str

    @staticmethod
    def of(name: str) -> "Place":
        """Parse a qualified name; no component has a meaning but the numbers."""
        parts = name.split(".")
        index = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if index is None or index + 1 == len(parts):
            return Place("", None, name)
        column = ".".join("*" if part.isdecimal() else part for part in parts[index + 1 :])
        return Place(".".join(parts[:index]), int(parts[index]), column)


def typical_block(names: Iterable[str]) -> str | None:
    """The module in the middle of the longest stack of layers that these linears stand in ("model.layers.15"), if there is one."""
    stacks: dict[str, set[int]] = {}
    for place in map(Place.of, names):
        if place.layer is not None:
            stacks.setdefault(place.stack, set()).add(place.layer)
    if not stacks:
        return None
    stack, layers = max(stacks.items(), key=lambda entry: len(entry[1]))
    return ".".join(filter(None, (stack, str(sorted(layers)[len(layers) // 2]))))


def headings(columns: list[str]) -> dict[str, str]:
    """For each dotted name the fewest last components that tell it from the others."""
    shortest = {}
    for column in columns:
        parts = column.split(".")
        tails = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        shortest[column] = next(tail for tail in tails if sum(f".{other}".endswith(f".{tail}") for other in columns) == 1 or tail == column)
    return shortest


def mean_bits(rows: Sequence[ReportRow]) -> float:
    """Stored bits per weight over some rows."""
    return 8 * sum(row.weight_bytes for row in rows) / sum(row.weights for row in rows)


def bits_cell(rows: list[ReportRow]) -> Text:
    """Bits per weight of the linears in one cell: cool for few, warm for many, a dot for none, dim for those left as they are."""
    if not rows:
        return Text("·", style="dim")
    bits = mean_bits(rows)
    if all(row.quantizer is None for row in rows):
        return Text(f"{bits:.0f}", style="dim")
    warmth = min(max((bits - 2) / 4, 0.0), 1.0)
    red, green, blue = (round(low + (high - low) * warmth) for low, high in ((80, 255), (170, 140), (255, 60)))
    return Text(f"{bits:.2f}", style=f"rgb({red},{green},{blue})")


def allocation_table(report: Report) -> RenderableType:
    """Bits per weight of each linear: layers down, kinds of linear across. Neighbouring layers that agree share a line."""
    stacks: dict[str, dict[int, dict[str, list[ReportRow]]]] = {}
    alone = []
    for row in report.rows:
        place = Place.of(row.name)
        if place.layer is None:
            alone.append(row)
        else:
            stacks.setdefault(place.stack, {}).setdefault(place.layer, {}).setdefault(place.column, []).append(row)
    parts: list[RenderableType] = [stack_table(stack, layers) for stack, layers in stacks.items()]
    if alone:
        table = quiet_table()
        table.add_column("outside the layers" if stacks else "linear", no_wrap=True)
        table.add_column("bits", justify="right")
        for row in alone:
            table.add_row(Text(row.name), bits_cell([row]))
        parts.append(table)
    return Group(*parts)


def stack_table(stack: str, layers: dict[int, dict[str, list[ReportRow]]]) -> Table:
    """The grid of one stack of layers, with the mean of each column below."""
    columns = list(dict.fromkeys(column for cells in layers.values() for column in cells))
    names = headings(columns)
    table = quiet_table(show_footer=True)
    table.add_column(Text(stack or "layer"), footer="mean", no_wrap=True, style="bold")
    for column in columns:
        table.add_column(Text(names[column]), footer=bits_cell(every(layers, column)), justify="right", overflow="fold")
    table.add_column("mean", footer=bits_cell([row for column in columns for row in every(layers, column)]), justify="right", style="dim")
    lines = []
    for layer, cells in layers.items():
        mean = bits_cell([row for rows in cells.values() for row in rows])
        lines.append((layer, (*(bits_cell(cells.get(column, [])) for column in columns), mean)))
    for cells_text, run in groupby(lines, key=lambda line: tuple(cell.plain for cell in line[1])):
        members = list(run)
        first, last = members[0][0], members[-1][0]
        table.add_row(str(first) if first == last else f"{first}-{last}", *members[0][1])
        assert len(cells_text) == len(columns) + 1
    return table


def every(layers: dict[int, dict[str, list[ReportRow]]], column: str) -> list[ReportRow]:
    """All rows of one column."""
    return [row for cells in layers.values() for row in cells.get(column, [])]


def quiet_table(show_footer: bool = False) -> Table:
    """A table without lines."""
    return Table(
        box=None, padding=(0, 1), pad_edge=False, collapse_padding=True, show_footer=show_footer, header_style="bold", footer_style="bold"
    )


def summary(report: Report) -> RenderableType:
    """Sizes, budget, prediction and fused groups, a line each."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    linears = [row for row in report.quantized if row.budgeted]
    ratio = report.model_bytes_before / report.model_bytes if report.model_bytes else 0.0
    table.add_row("model", f"{size(report.model_bytes_before)} -> {size(report.model_bytes)}, {ratio:.2f}x smaller")
    table.add_row(
        "linears",
        f"{len(linears)} of {len([row for row in report.rows if row.budgeted])} quantized: {report.linear_weights / 1e6:.1f} M weights, "
        f"{report.bits_per_weight:.3f} bits per weight, {size(report.linear_bytes)}",
    )
    for row in report.quantized:
        if not row.budgeted:
            table.add_row(
                "embedding",
                Text(f"{row.name}: {row.weights / 1e6:.1f} M weights, {row.bits:.3f} bits per weight, {size(row.weight_bytes)}"),
            )
    table.add_row("budget", Text(f"{report.budget}, effort {report.effort}, seed {report.seed}"))
    table.add_row("calibration", Text(report.calibration or "none: weights are rounded without error feedback"))
    if report.predicted_loss is not None:
        table.add_row("predicted", f"KL {report.predicted_loss:.4f} nats per token")
    if report.latency_s and report.batch is not None:  # of a model without linears to quantize it is 0
        table.add_row("time", Text(f"{speed(report.latency_s, report.batch)}: these linears alone, predicted for {report.gpu}"))
    if report.solver_gap is not None:
        table.add_row("solver", "optimal" if report.solver_gap <= 1e-6 else f"within {report.solver_gap:.2%} of the optimum")
    for kind, count in fused(report).most_common():
        table.add_row("fused", Text(f"{kind}: {count} group{'s' if count > 1 else ''}"))
    return table


def fused(report: Report) -> Counter[str]:
    """How often each kind of group occurs, groups of one aside."""
    columns = headings(list(dict.fromkeys(Place.of(row.name).column for row in report.rows)))
    groups = {row.group for row in report.rows if len(row.group) > 1}
    return Counter(" + ".join(columns.get(Place.of(name).column, name) for name in group) for group in groups)


def alike(report: Report) -> list[list[str]]:
    """The remarks, those together that are of one pass and reason and about places that differ only in their numbers.

    A remark reads "pass: subject: reason", and a reason may go on after a colon with what is particular to the place.
    """
    kinds: dict[str, list[str]] = {}
    for remark in report.remarks:
        kinds.setdefault(re.sub(r"\d+", "#", ": ".join(remark.split(": ")[:3])), []).append(remark)
    return list(kinds.values())


def remarks(report: Report) -> RenderableType:
    """What was declined and why; remarks that are alike share a line."""
    lines = [Text(same[0] if len(same) == 1 else f"{same[0]}  (and {len(same) - 1} like it)") for same in alike(report)]
    return Group(*(Padding(line, (0, 0, 0, 2)) for line in lines)) if lines else Text("")


def duration(seconds: float) -> str:
    """Seconds with four digits: 3.142 ms, 31.42 us."""
    return f"{1e3 * seconds:#.4g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:#.4g} us"


def speed(seconds: float, batch: int) -> str:
    """A step of a batch: 3.142 ms per token at batch 8, 2546 tokens/s."""
    return f"{duration(seconds)} per token at batch {batch}, {batch / seconds:.0f} tokens/s"


def size(count: float) -> str:
    """Bytes in decimal units with three digits or more: 999 B, 53.1 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
