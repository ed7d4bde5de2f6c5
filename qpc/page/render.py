"""Render: the templates, filled with what a checkpoint says."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from qpc.errors import UsageError
from qpc.ir.sketch import Role, Sketch
from qpc.page.breakdown import sizes, times
from qpc.page.facts import facts
from qpc.page.layout import Picture, layout
from qpc.page.measures import step_time
from qpc.page.source import Source
from qpc.page.table import table
from qpc.report import Report, alike, fused, size

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("dom.js", "tip.js", "heatmap.js", "plot.js", "table.js", "main.js")
MOST_BOXES = 80
"""A block of more boxes is not drawn."""
DESCRIBED_REMARKS = 40
"""Of remarks that are alike, so many are listed."""


@dataclass(frozen=True)
class Tile:
    """One number of the headline: what it is of, the number, its unit, and a line of context."""

    title: str
    value: str
    unit: str
    note: str


def write(directory: str | os.PathLike[str], file: Path) -> None:
    """Make the page of the checkpoint in this directory.

    Raises `CheckpointError` if there is none, or a damaged one, and `UsageError` if the file cannot be written.
    """
    page = render(Source.read(directory))
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror or error}") from error


def render(source: Source) -> str:
    """The page of a checkpoint, as HTML that needs nothing else. The same checkpoint gives the same page."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "ensure_ascii": False}
    report = source.report
    return environment.get_template("page.html").render(
        source=source,
        report=report,
        tiles=list(tiles(report)),
        fused=fused(report).most_common(),
        facts=facts(source),
        sizes=sizes(source),
        times=times(source),
        table=table(source),
        remarks=[(*_parts(same[0]), same[:DESCRIBED_REMARKS], len(same)) for same in alike(report)],
        block=report.block,
        pictures=list(pictures(source)),
        row_of={row.name: index for index, row in enumerate(report.rows)},
        Role=Role,
        style=_file("style.css"),
        script=Markup("\n").join(map(_file, SCRIPTS)),
    )


def tiles(report: Report) -> Iterator[Tile]:
    """The headline: size, rate, predicted loss, time, and how good the allocation is."""
    amount, unit = size(report.model_bytes).split(" ")
    ratio = report.model_bytes_before / report.model_bytes if report.model_bytes else 0.0
    yield Tile("Model", amount, unit, f"{ratio:.2f}× smaller than {size(report.model_bytes_before)}")
    linears = [row for row in report.rows if row.budgeted]
    count = sum(row.quantizer is not None for row in linears)
    yield Tile("Rate", f"{report.bits_per_weight:.3f}", "bits per weight", f"{count} of {len(linears)} linears quantized")
    if report.predicted_loss is not None:
        yield Tile("Predicted loss", f"{report.predicted_loss:.3f}", "nats of KL", "per token, from the sensitivities")
    if report.latency_s:
        amount, unit = step_time(report.latency_s).split(" ")
        before = sum(row.latency_before_s or 0.0 for row in report.rows)
        faster = f"{before / report.latency_s:.2f}× less than {step_time(before)}; " if before else ""
        yield Tile("Time of the linears", amount, unit, f"{faster}batch {report.batch}, {report.gpu}, predicted")
    if report.solver_gap is not None:
        optimal = report.solver_gap <= 1e-6
        value = ("optimal", "") if optimal else (f"{100 * report.solver_gap:.2f}", "%")
        yield Tile("Allocation", *value, "proven by the solver" if optimal else "from the optimum at most, proven")


def pictures(source: Source) -> Iterator[tuple[str, Picture]]:
    """The block before and after it was lowered, if the checkpoint holds one that can be looked at."""
    block = source.report.block
    if block is not None and max(len(block.before.boxes), len(block.after.boxes)) <= MOST_BOXES:
        yield "Before", layout(_alone(block.before), framed=False)
        yield "After", layout(block.after)


def _alone(sketch: Sketch) -> Sketch:
    """Without groups, so that boxes stand in the order of the graph."""

    return Sketch(tuple(replace(box, group=()) for box in sketch.boxes), sketch.arrows)


def _parts(remark: str) -> tuple[str, str]:
    """The pass, and what it says."""
    name, colon, rest = remark.partition(": ")
    return (name, rest) if colon else ("", remark)


def _file(name: str) -> Markup:
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))
