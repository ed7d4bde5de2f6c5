"""The linears of a program, as sensitivities see them."""

from torch import Tensor, fx

from qpc.ir.annotation import LinearSite, site_of
from qpc.ir.program import Program


def by_weight(program: Program) -> list[list[fx.Node]]:
    """The linear nodes of each distinct weight, in graph order."""
    found: dict[str, list[fx.Node]] = {}
    for node in program.linears():
        found.setdefault(site_of(node).weight, []).append(node)
    return list(found.values())


def stored_matrix(program: Program, site: LinearSite) -> Tensor:
    """The live weight of a site as [out_features, in_features], in its own dtype, without gradient."""
    stored = program.tensor(site.weight).detach()
    return stored.t() if site.transposed else stored
