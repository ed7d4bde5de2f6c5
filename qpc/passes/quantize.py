"""Quantize: rotate each weight that has a quantizer, and pack it, with error feedback if there are samples of the inputs."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import ClassVar

from torch import fx

from qpc.calibration import Samples
from qpc.ir.annotation import annotate, annotation, site_of
from qpc.ir.program import Program, Remark
from qpc.ir.stage import Stage
from qpc.moments import SecondMoments
from qpc.passes.base import Pass, PassResult
from qpc.passes.descent import Descent
from qpc.passes.feedbacks import Feedbacks, Job, Known
from qpc.passes.packing import Order, Parcel, pack
from qpc.passes.shelf import Facts, Shelf, hollow
from qpc.passes.student import Student
from qpc.passes.tune import Lessons, Tuning
from qpc.progress import Progress, silent, track
from qpc.quant.quantizer import PackedWeight, Quantizer
from qpc.spread import HERE, Spread

WAITING_BYTES = 6 << 30
"""Weights of several inputs wait for each other until they need about so much memory."""

WORK_BYTES = 16
"""Bytes for each weight that is being packed."""

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
    spread: where they are packed. moments: those of the samples, if they are not to be taken with the whole model in memory.
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
    spread: Spread = HERE
    moments: SecondMoments | None = None

    def run(self, program: Program) -> PassResult:
        """Pack every weight once, however many sites apply it: input by input, begun in the order in which the graph computes them."""
        nodes = [node for node in program.linears() if annotation(node).quantizer is not None]
        feedbacks = Feedbacks(program, tuple(nodes), self.samples, self.seed, self.rotation_block, self.known)
        sizes = {site_of(node).weight: site_of(node).shape.weights for node in nodes}
        lessons = self._lessons(program, sum(sizes.values()))
        for _ in track(self._in_turn(program, feedbacks, lessons), "quantize", len(sizes), self.progress):
            pass
        program.packed = {site_of(node).name: program.packed[site_of(node).name] for node in nodes}
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
        """Pack all weights; yields once for each."""
        stream = feedbacks.stream(self.sequential) if self.moments is None else self.moments
        shelved = set(self._shelved(program, feedbacks))
        yield from (None for _ in shelved)
        turns = ([job for job in jobs if job.weight not in shelved] for jobs in feedbacks.in_turn(stream, lambda key: key[0] in shelved))
        student = None if lessons is None else lessons.student
        for stage in self._stages(turns, lessons):
            for jobs, found in self.spread(pack, _orders(program, stage, student)):
                for job, (packed, facts) in zip(jobs, found, strict=True):
                    packed = replace(packed, rotation=job.rotation).to(program.home(job.weight))
                    if stream is not None and self.sequential:
                        stream.replace(dict.fromkeys(job.sites, packed.restored()))
                    if student is not None:
                        student.pack(job.weight, packed)
                    if self.shelf is not None:
                        self.shelf.put(job.weight, [site_of(node).name for node in job.sites], packed, facts)
                        packed = _hollow(job)
                    _record(program, job, packed, facts)
                    yield None

    def _shelved(self, program: Program, feedbacks: Feedbacks) -> Iterator[str]:
        """Record the weights that are on the shelf already."""
        if self.shelf is not None:
            for job in chain.from_iterable(feedbacks.in_turn(None)):
                if (facts := self.shelf.find(job.weight)) is not None:
                    _record(program, job, _hollow(job), facts)
                    yield job.weight

    def _stages(self, turns: Iterator[list[Job]], lessons: Lessons | None) -> Iterator[Iterator[list[Job]]]:
        """Weights that may be packed in any order, those of one list together; each stage is over before the next is asked for."""
        waits = self.sequential and self.samples is not None
        while (first := next(turns, None)) is not None:
            yield self._together(_until_lesson(chain([first], () if waits else turns), lessons))
            if lessons is not None and lessons.due:
                lessons.teach()

    def _together(self, turns: Iterable[list[Job]]) -> Iterator[list[Job]]:
        """Weights of one quantizer and width, of as many inputs as memory allows, if they are not to be packed one by one."""
        most = WAITING_BYTES if self.spread.together is None else self.spread.together
        if self.shelf is not None or most == 0:
            yield from ([job] for jobs in turns for job in jobs)
            return
        waiting: list[Job] = []
        for jobs in turns:
            waiting += jobs
            if _weighs(waiting) > most:
                yield from _alike(waiting)
                waiting = []
        yield from _alike(waiting)


def _until_lesson(turns: Iterable[list[Job]], lessons: Lessons | None) -> Iterator[list[Job]]:
    """The weights of a round, which are then counted; of all if there are no lessons."""
    for jobs in turns:
        yield jobs
        if lessons is not None:
            lessons.count(jobs)
            if lessons.due:
                return


def _alike(jobs: Iterable[Job]) -> list[list[Job]]:
    """Weights of one quantizer and width together."""
    found: dict[tuple[Quantizer | None, int], list[Job]] = {}
    for job in jobs:
        first = job.sites[0]
        found.setdefault((annotation(first).quantizer, site_of(first).shape.in_features), []).append(job)
    return list(found.values())


def _orders(program: Program, stage: Iterable[list[Job]], student: Student | None) -> Iterator[tuple[list[Job], Order]]:
    """What is to be packed, and for which jobs; their feedback is left out, so that nothing keeps it once it has been used."""
    for jobs in stage:
        bare, order = [replace(job, feedback=None) for job in jobs], _order(program, jobs, student)
        del jobs
        yield bare, order
        del order


def _order(program: Program, jobs: list[Job], student: Student | None) -> Order:
    """What packing weights of one quantizer and width takes: each as it is now."""
    quantizer = annotation(jobs[0].sites[0]).quantizer
    assert quantizer is not None
    parcels = []
    for job in jobs:
        site = site_of(job.sites[0])
        if student is None:
            parcels.append(Parcel(program.where(site.weight), site.transposed, job.rotation, job.feedback))
        else:
            parcels.append(Parcel(student.matrix(site), False, job.rotation, job.feedback))
    return Order(quantizer, tuple(parcels))


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


def _weighs(waiting: list[Job]) -> int:
    """Bytes that waiting jobs hold, or will while they are packed."""
    held = {id(job.feedback): job.feedback.nbytes for job in waiting if job.feedback is not None}
    return sum(held.values()) + sum(WORK_BYTES * site_of(job.sites[0]).shape.weights for job in waiting)
