"""Breakdowns: which kinds of linears take the bytes and the time, before and after."""

from collections.abc import Mapping
from dataclasses import dataclass

from qpc.page.facts import Kinds
from qpc.page.measures import step_time
from qpc.page.source import Source
from qpc.report import Place, headings, size

SMALLEST_SHARE = 0.01
"""What is less of the file than this goes into one part with its likes."""


@dataclass(frozen=True)
class Part:
    """One kind of linear, or what else the model holds. kind: its number; None for what is no linear. before, after: bytes or seconds."""

    title: str
    kind: int | None
    before: float
    after: float


@dataclass(frozen=True)
class Breakdown:
    """Parts that add up to the whole. in_bytes: else in seconds."""

    parts: tuple[Part, ...]
    in_bytes: bool

    @property
    def before(self) -> float:
        """All of it, as the model was given."""
        return sum(part.before for part in self.parts)

    @property
    def after(self) -> float:
        """All of it, as compiled."""
        return sum(part.after for part in self.parts)

    def text(self, value: float) -> str:
        """An amount with its unit."""
        return size(value) if self.in_bytes else step_time(value)


def sizes(source: Source) -> Breakdown:
    """Bytes of the stored tensors; before, those of quantized linears in proportion to their weights, which is exact for one dtype."""
    report, kinds = source.report, Kinds.of(source.report.rows)
    rows = {row.name: row for row in report.rows}
    stored: dict[str, int] = {}
    others: dict[str, int] = {}
    for name, count in source.tensors.items():
        module = name.rpartition(".")[0]
        of, column = (stored, Place.of(module).column) if module in rows else (others, Place.of(module).column)
        of[column] = of.get(column, 0) + count
    saved = report.model_bytes_before - report.model_bytes
    weights = sum(row.weights for row in report.quantized)
    original = (saved + sum(row.weight_bytes for row in report.quantized)) / weights if weights else 0.0
    change: dict[str, float] = {}
    for row in report.quantized:
        column = Place.of(row.name).column
        change[column] = change.get(column, 0.0) + original * row.weights - row.weight_bytes
    parts = [
        Part(title, kinds.number(column), stored.get(column, 0) + change.get(column, 0.0), stored.get(column, 0))
        for column, title in kinds.names.items()
    ]
    return Breakdown((*parts, *_others(others, sum(source.tensors.values()))), in_bytes=True)


def _others(others: Mapping[str, int], total: int) -> list[Part]:
    names = headings(list(others))
    large = [Part(names[column], None, count, count) for column, count in others.items() if count >= SMALLEST_SHARE * total]
    rest = sum(others.values()) - sum(part.after for part in large)
    return [*large, *([Part("all else", None, rest, rest)] if rest else [])]


def times(source: Source) -> Breakdown | None:
    """Predicted seconds of one step of the linears; None if no GPU was named, or by an earlier version that kept no times of linears."""
    kinds = Kinds.of(source.report.rows)
    spent: dict[str, tuple[float, float]] = {}
    for row in source.report.rows:
        if row.latency_s is not None and row.latency_before_s is not None:
            column = Place.of(row.name).column
            before, after = spent.get(column, (0.0, 0.0))
            spent[column] = before + row.latency_before_s, after + row.latency_s
    parts = tuple(Part(kinds.names[column], kinds.number(column), *values) for column, values in spent.items())
    return Breakdown(parts, in_bytes=False) if any(part.before for part in parts) else None
