"""Measures: what a cell of the allocation can be coloured by."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from qpc.page.source import Source
from qpc.quant.quantizer import Quantizer
from qpc.report import ReportRow, duration, mean_bits

DECIBELS_PER_BIT = 20 * math.log10(2)


@dataclass(frozen=True)
class Measure:
    """A number that a set of linears has, or None.

    key: for machines. title, unit: for people. logarithmic: whether its scale is. of: computes it. digits: significant ones where it is
    written, after the point if fixed.
    """

    key: str
    title: str
    unit: str
    logarithmic: bool
    of: Callable[[Sequence[ReportRow]], float | None]
    digits: int = 2
    fixed: bool = False

    def text(self, value: float | None) -> str:
        """Without its unit."""
        if value is None:
            return "–"
        return f"{value:.{self.digits}f}" if self.fixed else significant(value, self.digits)


def measures(source: Source) -> tuple[Measure, ...]:
    """Those that this checkpoint knows of any linear."""
    sensitivity = partial(_sum, lambda row: row.sensitivity, scale=1e3)
    all_of_them = (
        Measure("bits", "Bits", "stored bits per weight", False, mean_bits, 2, fixed=True),
        Measure("sensitivity", "Sensitivity", "10⁻³ nats of KL per unit of relative squared error", True, sensitivity),
        Measure("excess", "Above the bound", "dB of distortion above 2^(−2·bits)", False, mean_excess, 2, fixed=True),
        Measure("loss", "Predicted loss", "10⁻³ nats of KL per token", True, partial(_sum, source.loss, scale=1e3)),
        Measure("bytes", "Size", "kB stored", False, partial(_sum, lambda row: row.weight_bytes, scale=1e-3), 3),
        Measure("time", "Time", "µs in a step, predicted", False, partial(_sum, lambda row: row.latency_s, scale=1e6)),
    )
    rows = source.report.rows
    return tuple(measure for measure in all_of_them if any(measure.of([row]) is not None for row in rows))


def excess(row: ReportRow) -> float | None:
    """Decibels of distortion above the least that a Gaussian can have at the stored bits, `2^(-2 bits)`."""
    if row.quantizer is None or row.distortion is None or row.distortion <= 0:
        return None
    return 10 * math.log10(row.distortion) + DECIBELS_PER_BIT * row.bits


def felt(row: ReportRow, quantizer: Quantizer | None) -> float | None:
    """The white relative squared error that would do as much harm as what error feedback left; None without feedback."""
    return None if row.remaining is None or quantizer is None else quantizer.distortion * row.remaining


def mean_excess(rows: Sequence[ReportRow]) -> float | None:
    """The mean of `excess` over those that have one."""
    found = [value for row in rows if (value := excess(row)) is not None]
    return math.fsum(found) / len(found) if found else None


def significant(value: float, digits: int) -> str:
    """A number with so many significant digits, none of them behind an exponent unless it is very large or small."""
    if value == 0 or not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e") if value else "0"
    places = digits - 1 - math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    return f"{value:.{max(places, 0)}f}"


def step_time(seconds: float) -> str:
    """Seconds with four digits: 3.142 ms, 31.42 µs."""
    return duration(seconds).replace(" us", " µs") if seconds else "0"


def _sum(of: Callable[[ReportRow], float | None], rows: Iterable[ReportRow], scale: float = 1.0) -> float | None:
    found = [value for row in rows if (value := of(row)) is not None]
    return scale * math.fsum(found) if found else None
