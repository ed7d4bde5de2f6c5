"""Quantize: rotate each weight that has a quantizer, and pack it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import networkx as nx  # type: ignore[import-untyped]
from torch import Tensor, fx

from qpc.ir.annotation import LinearSite, annotate, annotation
from qpc.ir.program import Program, Remark
from qpc.ir.stage import Stage
from qpc.kernels.encoder import encoder_for
from qpc.passes.base import Pass, PassResult
from qpc.progress import Progress, silent, track
from qpc.quant.hadamard import block_within
from qpc.quant.rotation import Rotation, seeded_generator

GAUSSIAN_KURTOSIS = 1.0
"""Mean excess kurtosis of rotated rows above which a quantizer made for Gaussians loses visibly."""


@dataclass(frozen=True)
class Quantize(Pass):
    """Sites that read the same value, or apply the same weight, share one random sign vector, so any chosen grouping stays valid.

    seed: of the signs. The signs of a site depend on the seed and on the name of the first site that shares them, on nothing else.
    rotation_block: most inputs that a rotation may mix, as `block_within` has it; None rotates as many as there is a matrix for.
    """

    name: ClassVar[str] = "quantize"
    requires: ClassVar[Stage] = Stage.ALLOCATED
    ensures: ClassVar[Stage] = Stage.QUANTIZED
    seed: int = 0
    rotation_block: int | None = None
    progress: Progress = silent

    def run(self, program: Program) -> PassResult:
        """Pack every weight once, however many sites apply it."""
        nodes = [node for node in program.linears() if annotation(node).quantizer is not None]
        signs = sign_owners(nodes)
        rotations: dict[str, Rotation] = {}
        remarks: list[Remark] = []
        applied: dict[str, list[fx.Node]] = {}
        for node in nodes:
            applied.setdefault(site_of(node).weight, []).append(node)
        for sharing in track(applied.values(), "quantize", len(applied), self.progress):
            note, site = annotation(sharing[0]), site_of(sharing[0])
            assert note.quantizer is not None
            weight = weight_matrix(program, site)
            owner = signs[site.name]
            if owner not in rotations:
                block = block_within(site.shape.in_features, self.rotation_block)
                rotations[owner] = Rotation.random(site.shape.in_features, seeded_generator(self.seed, owner), block).to(weight.device)
            rotation = rotations[owner]
            rotated = rotation.apply(weight)
            packed = replace(note.quantizer.quantize(rotated, encoder_for(weight.device)), rotation=rotation)
            kurtosis = excess_kurtosis(weight), excess_kurtosis(rotated)
            if kurtosis[1] > GAUSSIAN_KURTOSIS:
                reason = f"still far from Gaussian after the rotation in blocks of {rotation.block}: excess kurtosis {kurtosis[1]:.1f}"
                remarks.append(self.declined(site.name, reason))
            error = relative_error(rotated, packed.rotated())
            for node in sharing:
                program.packed[site_of(node).name] = packed
                annotate(node, annotation(node).but(distortion=error, weight_bytes=packed.nbytes, kurtosis=kurtosis))
        program.decisions.update((site_of(node).name, annotation(node)) for node in program.linears())
        return PassResult(tuple(program.packed), tuple(remarks))


def site_of(node: fx.Node) -> LinearSite:
    """The site of a linear node."""
    site = annotation(node).site
    assert site is not None, f"{node.name} is not a linear site"
    return site


def sign_owners(nodes: Iterable[fx.Node]) -> dict[str, str]:
    """For each site the name of the first site whose signs it must share: by a common input value or a common weight, transitively."""
    links = nx.Graph()
    for node in nodes:
        site, group = site_of(node), annotation(node).group
        assert group is not None
        links.add_edge(("site", site.name), ("value", group.input))
        links.add_edge(("site", site.name), ("weight", site.weight))
    owners: dict[str, str] = {}
    order = {site_of(node).name: index for index, node in enumerate(nodes)}
    for component in nx.connected_components(links):
        names = sorted((name for kind, name in component if kind == "site"), key=order.__getitem__)
        owners.update(dict.fromkeys(names, names[0]))
    return owners


def weight_matrix(program: Program, site: LinearSite) -> Tensor:
    """The live weight of a site as float32 [out_features, in_features]."""
    weight = program.tensor(site.weight).detach()
    return (weight.t() if site.transposed else weight).float()


def excess_kurtosis(weight: Tensor) -> float:
    """Mean excess kurtosis of the rows; 0 for a Gaussian. Rows of zeros are left out."""
    square = weight.double().square()
    variance = square.mean(dim=1)
    rows = variance > 0
    if not bool(rows.any()):
        return 0.0
    return float((square[rows].square().mean(dim=1) / variance[rows].square()).mean() - 3)


def relative_error(weight: Tensor, made: Tensor) -> float:
    """Squared error over squared norm; 0 for a weight of zeros."""
    norm = float(weight.double().square().sum())
    return float((weight.double() - made.double()).square().sum()) / norm if norm > 0 else 0.0
