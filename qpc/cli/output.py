"""What commands print: JSON for machines, tables for people."""

import json
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from qpc.planner import Plan
    from qpc.report import Report


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2, allow_nan=False))


def note(text: str) -> None:
    """A remark for people, on stderr."""
    Console(stderr=True, highlight=False).print(text, style="dim", soft_wrap=True, markup=False)


def described(report: "Report") -> dict[str, Any]:
    """A report with its totals, for machines."""
    totals = {"linear_weights": report.linear_weights, "linear_bytes": report.linear_bytes, "bits_per_weight": report.bits_per_weight}
    return totals | report.to_json()


def show(report: "Report") -> None:
    """Print a report for people."""
    from qpc.report import allocation_table, remarks, summary

    console = Console(highlight=False)
    for part in (allocation_table(report), summary(report)):
        console.print(part)
        console.print()
    if report.remarks:
        console.print("remarks", style="bold")
        console.print(remarks(report))


def show_plan(plan: "Plan") -> None:
    """Print a plan for people."""
    from qpc.plan_report import notes, point_summary, points_table
    from qpc.report import allocation_table

    console = Console(highlight=False)
    if plan.report is None:
        console.print(points_table(plan))
    else:
        for part in (allocation_table(plan.report), point_summary(plan, plan.points[0])):
            console.print(part)
            console.print()
    for line in notes(plan):
        console.print(line, style="dim")
