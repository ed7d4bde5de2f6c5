"""Quantize: rotate each weight that has a quantizer, and pack it, with error feedback if there are samples of the inputs."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from qpc.calibration import Samples
from qpc.ir.annotation import annotate, annotation, site_of
from qpc.ir.linear import stored_matrix
from qpc.ir.program import Program, Remark
from qpc.ir.stage import Stage
from qpc.kernels.encoder import encoder_for
from qpc.moments import SecondMoments
from qpc.passes.base import Pass, PassResult
from qpc.passes.descent import Descent
from qpc.passes.feedbacks import Feedbacks, Job, Key, Known
from qpc.passes.shelf import Facts, Shelf, hollow
from qpc.passes.student import Student
from qpc.passes.tune import Lessons, Tuning
from qpc.progress import Progress, silent, track
from qpc.quant.quantizer import PackedWeight, Quantizer
from qpc.quant.stacking import quantize_stacked

WAITING_BYTES = 6 << 30
"""Weights of several inputs wait for each other until they need about so much memory."""

WORK_BYTES = 16
"""Bytes for each weight that is being packed."""

MEASURED_WEIGHTS = 1 << 22
"""Weights whose errors are measured at a time, in float64."""

GAUSSIAN_KURTOSIS = 1.0
"""Mean excess kurtosis of rotated rows above which a quantizer made for Gaussians loses visibly."""


@dataclass(frozen=True)
class Quantize(Pass):
    """Rotates and packs; signs are shared as `Feedbacks` says.

    seed: of the signs.
    rotation_block: most inputs that a rotation may mix, as `block_within` has it; None rotates as many as there is a matrix for.
    samples: inputs on which the second moments for error feedback are taken; None: each weight is rounded on its own.
    sequential: take each moment behind the layers that are already quantized, instead of all from the original model. Then only the
        linears of one input can be rounded together; else those of many layers are, which keeps a GPU busy.
    known: feedback that was made before, of the original model.
    tuning: in how many rounds, and how weights that are left are tuned between two; None: in one. lessons: samples for that; by default the
        same.
    shelf: takes every weight as soon as it is packed, and what it has already is not packed again; weights are then packed one by one.
    moments: those of the samples, if they are not to be taken with the whole model in memory.
    """

    name: ClassVar[str] = "quantize"
    requires: ClassVar[Stage] = Stage.ALLOCATED
    ensures: ClassVar[Stage] = Stage.QUANTIZED
    seed: int = 0
    rotation_block: int | None = None
    progress: Progress = silent
    samples: Samples | None = None
    sequential: bool = False
    known: Known = field(default_factory=Known)
    tuning: Tuning | None = None
    lessons: Samples | None = None
    shelf: Shelf | None = None
    moments: SecondMoments | None = None

    def run(self, program: Program) -> PassResult:
        """Pack every weight once, however many sites apply it: input by input, in the order in which the graph computes them."""
        nodes = [node for node in program.linears() if annotation(node).quantizer is not None]
        feedbacks = Feedbacks(program, tuple(nodes), self.samples, self.seed, self.rotation_block, self.known)
        sizes = {site_of(node).weight: site_of(node).shape.weights for node in nodes}
        lessons = self._lessons(program, sum(sizes.values()))
        for _ in track(self._in_turn(program, feedbacks, lessons), "quantize", len(sizes), self.progress):
            pass
        remarks = list(self._far_from_gaussian(program, nodes))
        if lessons is not None:
            lessons.student.write()
            remarks += [self.declined(type(program.module).__name__, text) for text in lessons.told]
        program.decisions.update((site_of(node).name, annotation(node)) for node in program.linears())
        return PassResult(tuple(program.packed), tuple(remarks))

    def _lessons(self, program: Program, weights: int) -> Lessons | None:
        """What goes on between rounds, if there are several."""
        samples = self.samples if self.lessons is None else self.lessons
        if self.tuning is None or samples is None or self.tuning.rounds == 1 or self.tuning.declines(program, samples):
            return None
        return Lessons(Descent(Student(program), samples, self.seed, self.progress), self.tuning, weights)

    def _far_from_gaussian(self, program: Program, nodes: list[fx.Node]) -> Iterator[Remark]:
        """What the rotation did not help enough, each weight once."""
        for node in {site_of(node).weight: node for node in reversed(nodes)}.values():
            name, kurtosis, rotation = site_of(node).name, annotation(node).kurtosis, program.packed[site_of(node).name].rotation
            if kurtosis is not None and kurtosis[1] > GAUSSIAN_KURTOSIS:
                how = "a folded rotation" if rotation is None else f"the rotation in blocks of {rotation.block}"
                reason = f"still far from Gaussian after {how}: excess kurtosis {kurtosis[1]:.1f}"
                yield self.declined(name, reason)

    def _in_turn(self, program: Program, feedbacks: Feedbacks, lessons: Lessons | None) -> Iterator[None]:
        """Pack all weights, in the order of their inputs; yields once for each."""
        stream = feedbacks.stream(self.sequential) if self.moments is None else self.moments
        waiting: list[Job] = []
        for jobs in feedbacks.in_turn(stream, self._packed):
            waiting += jobs
            due = lessons is not None and lessons.due(jobs)
            if due or self.shelf is not None or (self.sequential and stream is not None) or _weighs(program, waiting) > WAITING_BYTES:
                yield from self._flush(program, waiting, stream, lessons)
                waiting = []
            if lessons is not None and due:
                lessons.teach()
        yield from self._flush(program, waiting, stream, lessons)

    def _packed(self, key: Key) -> bool:
        """Whether a weight is on the shelf already."""
        return self.shelf is not None and self.shelf.find(key[0]) is not None

    def _flush(self, program: Program, waiting: list[Job], stream: SecondMoments | None, lessons: Lessons | None) -> Iterator[None]:
        """Pack what waits: weights of one quantizer and width together."""
        alike: dict[tuple[Quantizer | None, int] | int, list[Job]] = {}
        for number, job in enumerate(waiting):
            if self.shelf is not None and (facts := self.shelf.find(site_of(job.sites[0]).weight)) is not None:
                _record(program, job, _hollow(job), facts)
                yield None
                continue
            first = job.sites[0]
            key = (annotation(first).quantizer, site_of(first).shape.in_features)
            alike.setdefault(key if self.shelf is None else number, []).append(job)
        for jobs in alike.values():
            made = self._pack(program, jobs, None if lessons is None else lessons.student)
            if lessons is not None:
                for job in jobs:
                    lessons.student.pack(site_of(job.sites[0]).weight, program.packed[site_of(job.sites[0]).name])
            if stream is not None and self.sequential:
                for job, weight in zip(jobs, made, strict=True):
                    stream.replace(dict.fromkeys(job.sites, weight if job.rotation is None else job.rotation.invert(weight)))
            del made
            yield from (None for _ in jobs)

    def _pack(self, program: Program, jobs: list[Job], student: Student | None) -> list[Tensor]:
        """Quantize weights of one quantizer and width, and record them: each as it is now, rotated float32 [out_features, in_features]."""
        quantizer = annotation(jobs[0].sites[0]).quantizer
        assert quantizer is not None
        rotated, kurtosis = [], []
        for job in jobs:
            site = site_of(job.sites[0])
            weight = stored_matrix(program, site).float() if student is None else student.matrix(site)
            kurtosis.append(excess_kurtosis(weight))
            rotated.append(weight if job.rotation is None else job.rotation.apply(weight))
            del weight
        found = quantize_stacked(quantizer, rotated, encoder_for(rotated[0].device), [job.feedback for job in jobs])
        made = []
        for job, original, before, packed in zip(jobs, kurtosis, rotated, found, strict=True):
            packed = replace(packed, rotation=job.rotation)
            made.append(packed.rotated())
            facts = Facts(
                distortion=relative_error(before, made[-1]),
                weight_bytes=packed.nbytes,
                kurtosis=(original, excess_kurtosis(before)),
                remaining=None if job.feedback is None else job.feedback.share_left(before, made[-1], quantizer.distortion),
            )
            if self.shelf is not None:
                self.shelf.put(site_of(job.sites[0]).weight, [site_of(node).name for node in job.sites], packed, facts)
                packed = _hollow(job)
            _record(program, job, packed, facts)
        return made


def _hollow(job: Job) -> PackedWeight:
    """What stands for the weight of a job that is on a shelf."""
    quantizer = annotation(job.sites[0]).quantizer
    assert quantizer is not None
    return hollow(quantizer, site_of(job.sites[0]).shape, job.rotation)


def _record(program: Program, job: Job, packed: PackedWeight, facts: Facts) -> None:
    """Leave a packed weight, and what is known of it, with all its sites."""
    for node in job.sites:
        program.packed[site_of(node).name] = packed
        annotate(node, annotation(node).but(**asdict(facts)))


def _weighs(program: Program, waiting: list[Job]) -> int:
    """Bytes that waiting jobs hold, or will while they are packed."""
    held = {id(job.feedback): job.feedback.nbytes for job in waiting if job.feedback is not None}
    return sum(held.values()) + sum(WORK_BYTES * site_of(job.sites[0]).shape.weights for job in waiting)


def excess_kurtosis(weight: Tensor) -> float:
    """Mean excess kurtosis of the rows; 0 for a Gaussian. Rows of zeros are left out."""
    found = []
    for rows in _row_slabs(weight):
        square = rows.double().square()
        variance = square.mean(dim=1)
        there = variance > 0
        found.append(square[there].square().mean(dim=1) / variance[there].square())
    each = torch.cat(found)
    return float(each.mean() - 3) if len(each) else 0.0


def relative_error(weight: Tensor, made: Tensor) -> float:
    """Squared error over squared norm; 0 for a weight of zeros."""
    norm, error = [], []
    for rows, ours in zip(_row_slabs(weight), _row_slabs(made), strict=True):
        wide = rows.double()
        norm.append(wide.square().sum(dim=1))
        error.append((wide - ours.double()).square().sum(dim=1))
    total = float(torch.cat(norm).sum())
    return float(torch.cat(error).sum()) / total if total > 0 else 0.0


def _row_slabs(matrix: Tensor) -> tuple[Tensor, ...]:
    """Rows that are measured together, so that what is computed in float64 needs little memory."""
    return torch.split(matrix, max(1, MEASURED_WEIGHTS // max(1, matrix.shape[1])))
