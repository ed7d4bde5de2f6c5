"""The linears of a program, as sensitivities see them."""

from torch import fx

from qpc.ir.annotation import site_of
from qpc.ir.program import Program


def by_weight(program: Program) -> list[list[fx.Node]]:
    """The linear nodes of each distinct weight, in graph order."""
    found: dict[str, list[fx.Node]] = {}
    for node in program.linears():
        found.setdefault(site_of(node).weight, []).append(node)
    return list(found.values())
