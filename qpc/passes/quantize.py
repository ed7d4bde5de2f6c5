"""Quantize: rotate each weight that has a quantizer, and pack it, with error feedback if there are samples of the inputs."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import networkx as nx  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx

from qpc.calibration import Samples
from qpc.ir.annotation import LinearSite, annotate, annotation
from qpc.ir.program import Program
from qpc.ir.stage import Stage
from qpc.ir.values import representatives
from qpc.kernels.encoder import encoder_for
from qpc.moments import MomentStream
from qpc.passes.base import Pass, PassResult
from qpc.progress import Progress, silent, track
from qpc.quant.feedback import round_with_feedback
from qpc.quant.moment import Moment
from qpc.quant.rotation import Rotation


@dataclass(frozen=True)
class Quantize(Pass):
    """Sites that read the same value, or apply the same weight, share one random sign vector, so any chosen grouping stays valid.

    seed: of the signs. The signs of a site depend on the seed and on the name of the first site that shares them, on nothing else.
    samples: inputs on which the second moments for error feedback are taken; None: each weight is rounded on its own.
    sequential: take each moment behind the layers that are already quantized, instead of all from the original model.
    """

    name: ClassVar[str] = "quantize"
    requires: ClassVar[Stage] = Stage.ALLOCATED
    ensures: ClassVar[Stage] = Stage.QUANTIZED
    seed: int = 0
    progress: Progress = silent
    samples: Samples | None = None
    sequential: bool = True

    def run(self, program: Program) -> PassResult:
        """Pack every weight once, however many sites apply it: input by input, in the order in which the graph computes them."""
        nodes = [node for node in program.linears() if annotation(node).quantizer is not None]
        stream = None
        if self.samples is not None:
            stream = MomentStream(program, self.samples.batches, self.samples.held_out, sequential=self.sequential)
        count = len({site_of(node).weight for node in nodes})
        for sharing, rotation, moment in track(self._in_turn(program, nodes, stream), "quantize", count, self.progress):
            made = _pack(program, sharing, rotation, moment)
            if stream is not None:
                stream.replace(dict.fromkeys(sharing, rotation.invert(made)))
        program.decisions.update((site_of(node).name, annotation(node)) for node in program.linears())
        return PassResult(changed=tuple(program.packed))

    def _in_turn(
        self, program: Program, nodes: list[fx.Node], stream: MomentStream | None
    ) -> Iterator[tuple[list[fx.Node], Rotation, Moment | None]]:
        """The sites of each weight, with the rotation of their input and its rotated moment; those of one input after each other."""
        signs = sign_owners(nodes)
        rotations: dict[str, Rotation] = {}
        for weights in by_input(program, nodes, signs):
            first = weights[0]
            site = site_of(first[0])
            owner = signs[site.name]
            if owner not in rotations:
                drawn = Rotation.random(site.shape.in_features, self._generator(owner))
                rotations[owner] = drawn.to(program.tensor(site.weight).device)
            moment = None if stream is None else stream.moment(first).rotated(rotations[owner])
            for sharing in weights:
                yield sharing, rotations[owner], moment

    def _generator(self, owner: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}:{owner}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


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


def by_input(program: Program, nodes: Iterable[fx.Node], signs: Mapping[str, str]) -> list[list[list[fx.Node]]]:
    """The sites of each weight, of all weights that are applied to the same values: in graph order of the first site of each."""
    same = representatives(program.graph)
    applied: dict[str, list[fx.Node]] = {}
    for node in nodes:
        applied.setdefault(site_of(node).weight, []).append(node)
    stages: dict[object, list[list[fx.Node]]] = {}
    for sharing in applied.values():
        values = tuple(same[node.all_input_nodes[0]] for node in sharing)
        stages.setdefault((signs[site_of(sharing[0]).name], values), []).append(sharing)
    return list(stages.values())


def _pack(program: Program, sharing: list[fx.Node], rotation: Rotation, moment: Moment | None) -> Tensor:
    """Quantize the weight that these sites apply, and record it: the weight as it is now, rotated float32 [out_features, in_features]."""
    note, site = annotation(sharing[0]), site_of(sharing[0])
    assert note.quantizer is not None
    weight = weight_matrix(program, site)
    rotated = rotation.apply(weight)
    encoder = encoder_for(weight.device)
    if moment is None:
        packed, remaining = note.quantizer.quantize(rotated, encoder), None
    else:
        packed, remaining = round_with_feedback(note.quantizer, rotated, moment, encoder)
    packed = replace(packed, rotation=rotation)
    made = packed.rotated()
    facts = {
        "distortion": relative_error(rotated, made),
        "weight_bytes": packed.nbytes,
        "kurtosis": (excess_kurtosis(weight), excess_kurtosis(rotated)),
        "remaining": remaining,
    }
    for node in sharing:
        program.packed[site_of(node).name] = packed
        annotate(node, annotation(node).but(**facts))
    return made


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
