"""Facts: what a page shows, as values of JSON. Whatever a person reads is written here; scripts only place and colour it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qpc.page.measures import Measure, excess, felt, measures, significant, step_time
from qpc.page.source import Source
from qpc.report import Place, ReportRow, headings, size
from qpc.solver import water_filling


@dataclass(frozen=True)
class Kinds:
    """The kinds of linears by name of their column, in the order of the report: their short headings, and their numbers."""

    names: Mapping[str, str]

    @staticmethod
    def of(rows: Sequence[ReportRow]) -> "Kinds":
        """Kinds of these linears."""
        return Kinds(headings(list(dict.fromkeys(Place.of(row.name).column for row in rows))))

    def number(self, column: str) -> int:
        """Of a kind, from 0."""
        return list(self.names).index(column)


def facts(source: Source) -> dict[str, Any]:
    """Rows, stacks of layers and plots of a checkpoint, as a value that `json.dumps` takes."""
    rows, kinds = source.report.rows, Kinds.of(source.report.rows)
    known = measures(source)
    number = {row.name: index for index, row in enumerate(rows)}
    return {
        "measures": [{"key": each.key, "title": each.title, "unit": each.unit, "log": each.logarithmic} for each in known],
        "kinds": list(kinds.names.values()),
        "rows": [
            {
                "name": row.name,
                "kind": kinds.number(Place.of(row.name).column),
                "group": [number[name] for name in row.group if name in number],
                "details": details(source, row),
            }
            for row in rows
        ],
        "stacks": stacks(source, kinds, known),
        "rate": rate_distortion(source),
        "law": allocation_law(source),
    }


def stacks(source: Source, kinds: Kinds, known: Sequence[Measure]) -> list[dict[str, Any]]:
    """The grids of layers and kinds, the last one of what stands outside the layers."""
    placed: dict[str, dict[tuple[int | None, str], list[int]]] = {}
    for index, row in enumerate(source.report.rows):
        place = Place.of(row.name)
        stack = "" if place.layer is None else place.stack or "layers"
        placed.setdefault(stack, {}).setdefault((place.layer, place.column), []).append(index)
    order = sorted(placed, key=lambda stack: stack == "")
    return [_stack(source, stack, placed[stack], kinds, known) for stack in order]


def _stack(
    source: Source, name: str, placed: Mapping[tuple[int | None, str], list[int]], kinds: Kinds, known: Sequence[Measure]
) -> dict[str, Any]:
    layers = list(dict.fromkeys(layer for layer, _ in placed))
    columns = list(dict.fromkeys(column for _, column in placed))
    every = {column: [index for (_, other), indices in placed.items() if other == column for index in indices] for column in columns}
    return {
        "name": name,
        "layers": ["" if layer is None else str(layer) for layer in layers],
        "kinds": [kinds.number(column) for column in columns],
        "totals": [_cell(source, every[column], known) for column in columns],
        "cells": [
            {"layer": layers.index(layer), "kind": columns.index(column)} | _cell(source, indices, known)
            for (layer, column), indices in placed.items()
        ],
    }


def _cell(source: Source, indices: Sequence[int], known: Sequence[Measure]) -> dict[str, Any]:
    rows = [source.report.rows[index] for index in indices]
    values = {measure.key: measure.of(rows) for measure in known}
    return {
        "rows": list(indices),
        "kept": all(row.quantizer is None for row in rows),
        "values": values,
        "texts": {measure.key: measure.text(values[measure.key]) for measure in known},
    }


def details(source: Source, row: ReportRow) -> list[list[str]]:
    """Everything about one linear: pairs of a name and what it is, in words."""
    loss, above, feels = source.loss(row), excess(row), felt(row, source.quantizers.get(row.name))
    found: list[tuple[str, str | None]] = [
        ("shape", f"{row.out_features} × {row.in_features}"),
        ("quantizer", row.quantizer or f"none: {row.reason or 'it stays as it is'}"),
        ("bits", f"{row.bits:.3f} per weight"),
        ("size", size(row.weight_bytes)),
        ("distortion", None if row.distortion is None else f"{significant(row.distortion, 3)} of the energy"),
        ("above the bound", None if above is None else f"{above:.2f} dB"),
        ("felt at the output", None if feels is None else f"{significant(feels, 3)} ({row.remaining:.0%} of white error)"),
        ("sensitivity", None if row.sensitivity is None else f"{significant(row.sensitivity, 3)} nats"),
        ("predicted loss", None if loss is None else f"{significant(1e3 * loss, 3)} · 10⁻³ nats"),
        ("time", None if row.latency_s is None else step_time(row.latency_s)),
        ("runs with", ", ".join(_tail(name) for name in row.group if name != row.name) or None),
    ]
    return [[name, text] for name, text in found if text is not None]


def rate_distortion(source: Source) -> list[dict[str, Any]]:
    """The place of each quantized linear: stored bits, distortion of its weight, and what error feedback left of it, if there was any."""
    return [
        {"row": index, "bits": row.bits, "distortion": row.distortion, "felt": felt(row, source.quantizers.get(row.name))}
        for index, row in enumerate(source.report.rows)
        if excess(row) is not None
    ]


def allocation_law(source: Source) -> dict[str, Any] | None:
    """Stored bits against what a weight feels [nats], and the line on which ideal Gaussian quantizers of the same bits would lie.

    That is `bits = log2(felt per weight / level) / 2` by reverse water-filling (`qpc.solver.water_filling`). None without sensitivities.
    """
    placed = [(index, row, value / row.weights) for index, row in enumerate(source.report.rows) if (value := _felt(row)) > 0]
    if not placed:
        return None
    total = math.fsum(row.bits * row.weights for _, row, _ in placed)
    ideal = water_filling([value * row.weights for _, row, value in placed], [row.weights for _, row, _ in placed], total)
    title = "sensitivity per weight, nats"
    if source.report.calibration is not None:
        title = "sensitivity per weight × error left, nats"
    return {
        "title": title,
        "level": ideal.level,
        "points": [{"row": index, "felt": value, "bits": row.bits} for index, row, value in placed],
    }


def _felt(row: ReportRow) -> float:
    """Sensitivity to a white error of the quantizer, as far as error feedback leaves it [nats]; 0 if nothing is known."""
    if row.quantizer is None or row.sensitivity is None:
        return 0.0
    return row.sensitivity * (1.0 if row.remaining is None else row.remaining)


def _tail(name: str) -> str:
    return name.rpartition(".")[2]
