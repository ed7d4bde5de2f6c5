"""The table of all linears: every cell as it is read, and the value that it is sorted by."""

from collections.abc import Callable
from dataclasses import dataclass

from qpc.page.measures import excess, significant, step_time
from qpc.page.source import Source
from qpc.report import ReportRow, size


@dataclass(frozen=True)
class Cell:
    """value: what sorting compares; None, for what is not known, comes last."""

    text: str
    value: float | str | None


@dataclass(frozen=True)
class Table:
    """titles: of the columns, each with whether it holds numbers. lines: one for each linear, in the order of the report."""

    titles: tuple[tuple[str, bool], ...]
    lines: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class _Column:
    title: str
    of: Callable[[ReportRow], float | str | None]
    text: Callable[[float], str] | None = None

    def cell(self, row: ReportRow) -> Cell:
        value = self.of(row)
        if value is None:
            return Cell("–", None)
        return Cell(str(value) if isinstance(value, str) or self.text is None else self.text(value), value)


def table(source: Source) -> Table:
    """All rows, with the columns that any of them fills."""
    columns = (
        _Column("linear", lambda row: row.name),
        _Column("shape", lambda row: row.weights, lambda _: ""),
        _Column("quantizer", lambda row: row.quantizer or "as it is"),
        _Column("bits", lambda row: row.bits, lambda bits: f"{bits:.3f}"),
        _Column("dB above bound", excess, lambda decibels: f"{decibels:.2f}"),
        _Column("sensitivity", lambda row: row.sensitivity, lambda nats: significant(nats, 3)),
        _Column("error left", lambda row: row.remaining, lambda share: f"{share:.0%}"),
        _Column("loss, 10⁻³ nats", source.loss, lambda nats: significant(1e3 * nats, 3)),
        _Column("size", lambda row: row.weight_bytes, size),
        _Column("time", lambda row: row.latency_s, step_time),
    )
    rows = source.report.rows
    filled = [column for column in columns if any(column.of(row) is not None for row in rows)]
    lines = tuple(tuple(_line(column, row) for column in filled) for row in rows)
    return Table(tuple((column.title, column.text is not None) for column in filled), lines)


def _line(column: _Column, row: ReportRow) -> Cell:
    cell = column.cell(row)
    return Cell(f"{row.out_features} × {row.in_features}", cell.value) if column.title == "shape" else cell
