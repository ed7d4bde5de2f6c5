"""Calibrate: how much of the error of each weight feedback will leave, known before anything is rounded."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from qpc.calibration import Samples
from qpc.ir.annotation import annotate, annotation, site_of
from qpc.ir.program import Program
from qpc.ir.stage import Stage
from qpc.moments import SecondMoments
from qpc.passes.base import Pass, PassResult
from qpc.passes.feedbacks import Feedbacks, Key, Known
from qpc.progress import Progress, silent, track
from qpc.quant.feedback import Expected, Feedback, StackFeedback
from qpc.quant.unfactored import Unfactored, expected, factored
from qpc.spread import HERE, Spread

ALIKE = "all rows that an expert reads count alike: gradients do not say which of them matter"


@dataclass(frozen=True)
class Calibrate(Pass):
    """Takes the second moment of what each linear reads, in the original model, and factors it as the rounding will.

    The share of white rounding errors that is left depends on the moment alone, not on the quantizer. It is judged by held-out samples
    where there are any, for on its own samples feedback looks better than it is. Each expert of a stack has a moment of its own, filled up
    from that of all (`filled_up`) where it read few inputs.

    samples: as `Quantize` will have them, with the same seed and rotation_block. known: where the feedback is left for it; weights of which
    it knows already what is expected are not measured. spread: where moments are factored. moments: those of the samples, if they are
    not to be taken with the whole model in memory.
    """

    name: ClassVar[str] = "calibrate"
    requires: ClassVar[Stage] = Stage.GROUPED
    ensures: ClassVar[Stage] = Stage.GROUPED
    samples: Samples
    seed: int = 0
    rotation_block: int | None = None
    known: Known = field(default_factory=Known)
    progress: Progress = silent
    spread: Spread = HERE
    moments: SecondMoments | None = None

    def run(self, program: Program) -> PassResult:
        """Annotate every linear with its expected share."""
        nodes = tuple(program.linears())
        feedbacks = Feedbacks(program, nodes, self.samples, self.seed, self.rotation_block)
        jobs = [job for each in feedbacks.in_turn(None) for job in each]
        if any(job.key not in self.known.expected for job in jobs):
            for key, feedback in track(self._made(feedbacks), "calibrate", len(jobs), self.progress):
                self.known.keep(key, feedback)
        for job in jobs:
            for node in job.sites:
                annotate(node, annotation(node).but(share=self.known.expected[job.key].share))
        stacks = list(dict.fromkeys(site.name for node in nodes if (site := site_of(node)).experts is not None))
        more = f" and {len(stacks) - 1} more" if len(stacks) > 1 else ""
        remarks = (self.declined(f"{stacks[0]}{more}", ALIKE),) if stacks and self.samples.importance is not None else ()
        return PassResult(tuple(site_of(node).name for node in nodes), remarks)

    def _made(self, feedbacks: Feedbacks) -> Iterator[tuple[Key, Feedback | StackFeedback | Expected]]:
        """The weights with their feedback, or what is expected of it, if that was not known."""
        make: Callable[[Unfactored], Feedback | StackFeedback | Expected] = factored if self.known.matrices else expected
        for keys, feedback in self.spread(make, self._unfactored(feedbacks)):
            yield from ((key, feedback) for key in keys)

    def _unfactored(self, feedbacks: Feedbacks) -> Iterator[tuple[list[Key], Unfactored]]:
        """The moments of each input, with the weights that share them."""
        moments = feedbacks.stream(sequential=False) if self.moments is None else self.moments
        for jobs in feedbacks.in_turn(moments, self.known.expected.__contains__):
            sharing: dict[int, list[Key]] = {}
            sources: dict[int, Unfactored] = {}
            for job in jobs:
                if job.feedback is not None:
                    assert isinstance(job.feedback, Unfactored), "nothing was made before"
                    sources[id(job.feedback)] = job.feedback
                    sharing.setdefault(id(job.feedback), []).append(job.key)
            jobs.clear()  # so that nothing keeps what was used
            for number, keys in sharing.items():
                yield keys, sources.pop(number)
