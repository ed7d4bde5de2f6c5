"""Quantize: rotate each weight that has a quantizer, and pack it, with error feedback if there are samples of the inputs."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import networkx as nx  # type: ignore[import-untyped]
from torch import Tensor, fx

from qpc.calibration import Samples
from qpc.ir.annotation import LinearSite, annotate, annotation
from qpc.ir.program import Program, Remark
from qpc.ir.stage import Stage
from qpc.ir.values import representatives
from qpc.kernels.encoder import encoder_for
from qpc.moments import MomentStream
from qpc.passes.base import Pass, PassResult
from qpc.progress import Progress, silent, track
from qpc.quant.feedback import Feedback
from qpc.quant.hadamard import block_within
from qpc.quant.quantizer import Quantizer
from qpc.quant.rotation import Rotation, seeded_generator
from qpc.quant.stacking import quantize_stacked

WAITING_BYTES = 6 << 30
"""Weights of several inputs wait for each other until they need about so much memory."""

WORK_BYTES = 16
"""Bytes for each weight that is being packed."""

GAUSSIAN_KURTOSIS = 1.0
"""Mean excess kurtosis of rotated rows above which a quantizer made for Gaussians loses visibly."""


@dataclass(frozen=True)
class Quantize(Pass):
    """Sites that read the same value, or apply the same weight, share one random sign vector, so any chosen grouping stays valid.

    seed: of the signs. The signs of a site depend on the seed and on the name of the first site that shares them, on nothing else.
    rotation_block: most inputs that a rotation may mix, as `block_within` has it; None rotates as many as there is a matrix for.
    samples: inputs on which the second moments for error feedback are taken; None: each weight is rounded on its own.
    sequential: take each moment behind the layers that are already quantized, instead of all from the original model. Then only the
        linears of one input can be rounded together; else those of many layers are, which keeps a GPU busy.
    """

    name: ClassVar[str] = "quantize"
    requires: ClassVar[Stage] = Stage.ALLOCATED
    ensures: ClassVar[Stage] = Stage.QUANTIZED
    seed: int = 0
    rotation_block: int | None = None
    progress: Progress = silent
    samples: Samples | None = None
    sequential: bool = False

    def run(self, program: Program) -> PassResult:
        """Pack every weight once, however many sites apply it: input by input, in the order in which the graph computes them."""
        nodes = [node for node in program.linears() if annotation(node).quantizer is not None]
        stream = None
        if self.samples is not None:
            stream = MomentStream(program, self.samples.batches, self.samples.held_out, sequential=self.sequential)
        count = len({site_of(node).weight for node in nodes})
        for _ in track(self._in_turn(program, nodes, stream), "quantize", count, self.progress):
            pass
        program.decisions.update((site_of(node).name, annotation(node)) for node in program.linears())
        return PassResult(tuple(program.packed), tuple(self._far_from_gaussian(program, nodes)))

    def _far_from_gaussian(self, program: Program, nodes: list[fx.Node]) -> Iterator[Remark]:
        """What the rotation did not help enough, each weight once."""
        for node in {site_of(node).weight: node for node in reversed(nodes)}.values():
            name, kurtosis, rotation = site_of(node).name, annotation(node).kurtosis, program.packed[site_of(node).name].rotation
            if kurtosis is not None and rotation is not None and kurtosis[1] > GAUSSIAN_KURTOSIS:
                reason = f"still far from Gaussian after the rotation in blocks of {rotation.block}: excess kurtosis {kurtosis[1]:.1f}"
                yield self.declined(name, reason)

    def _in_turn(self, program: Program, nodes: list[fx.Node], stream: MomentStream | None) -> Iterator[None]:
        """Pack all weights, in the order of their inputs; yields once for each."""
        signs = sign_owners(nodes)
        rotations: dict[str, Rotation] = {}
        waiting: list[_Job] = []
        for weights in by_input(program, nodes, signs):
            site = site_of(weights[0][0])
            owner = signs[site.name]
            if owner not in rotations:
                block = block_within(site.shape.in_features, self.rotation_block)
                drawn = Rotation.random(site.shape.in_features, seeded_generator(self.seed, owner), block)
                rotations[owner] = drawn.to(program.tensor(site.weight).device)
            rotation = rotations[owner]
            feedback = None if stream is None else Feedback.of(stream.moment(weights[0]).rotated(rotation))
            waiting += [_Job(tuple(sharing), rotation, feedback) for sharing in weights]
            if (self.sequential and stream is not None) or _weighs(program, waiting) > WAITING_BYTES:
                yield from self._flush(program, waiting, stream)
                waiting = []
        yield from self._flush(program, waiting, stream)

    def _flush(self, program: Program, waiting: list["_Job"], stream: MomentStream | None) -> Iterator[None]:
        """Pack what waits: weights of one quantizer and width together."""
        alike: dict[tuple[Quantizer | None, int], list[_Job]] = {}
        for job in waiting:
            first = job.sites[0]
            alike.setdefault((annotation(first).quantizer, site_of(first).shape.in_features), []).append(job)
        for jobs in alike.values():
            made = _pack(program, jobs)
            if stream is not None and self.sequential:
                for job, weight in zip(jobs, made, strict=True):
                    stream.replace(dict.fromkeys(job.sites, job.rotation.invert(weight)))
            yield from (None for _ in jobs)


@dataclass(frozen=True)
class _Job:
    """A weight to pack: the nodes that apply it, the rotation of their input, and the feedback for it."""

    sites: tuple[fx.Node, ...]
    rotation: Rotation
    feedback: Feedback | None


def _weighs(program: Program, waiting: list[_Job]) -> int:
    """Bytes that waiting jobs hold, or will while they are packed."""
    held = {id(job.feedback): job.feedback.nbytes for job in waiting if job.feedback is not None}
    return sum(held.values()) + sum(WORK_BYTES * site_of(job.sites[0]).shape.weights for job in waiting)


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


def _pack(program: Program, jobs: list[_Job]) -> list[Tensor]:
    """Quantize weights of one quantizer and width, and record them: each as it is now, rotated float32 [out_features, in_features]."""
    quantizer = annotation(jobs[0].sites[0]).quantizer
    assert quantizer is not None
    weights = [weight_matrix(program, site_of(job.sites[0])) for job in jobs]
    rotated = [job.rotation.apply(weight) for job, weight in zip(jobs, weights, strict=True)]
    found = quantize_stacked(quantizer, rotated, encoder_for(weights[0].device), [job.feedback for job in jobs])
    made = []
    for job, weight, before, packed in zip(jobs, weights, rotated, found, strict=True):
        packed = replace(packed, rotation=job.rotation)
        made.append(packed.rotated())
        facts = {
            "distortion": relative_error(before, made[-1]),
            "weight_bytes": packed.nbytes,
            "kurtosis": (excess_kurtosis(weight), excess_kurtosis(before)),
            "remaining": None if job.feedback is None else job.feedback.share_left(before, made[-1], quantizer.distortion),
        }
        for node in job.sites:
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
