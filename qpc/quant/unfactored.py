"""What error feedback is made of: making it is a pure function, which may be evaluated where and when there is room for its result."""

from dataclasses import dataclass, replace
from functools import cached_property

from qpc.quant.feedback import Expected, Feedback, StackFeedback
from qpc.quant.moment import Moment
from qpc.quant.rotation import Rotation


@dataclass(eq=False)
class Unfactored:
    """Second moments for the feedback of a weight, and how they are to be factored.

    moments: of the inputs, as they are before any rotation; of a stack of experts those of each, else one. stacked: whether it is a stack.
    rotation: of the inputs. damping: if it is known already. gradients: for feedback between rows too, as `Feedback.and_of` takes them.
    """

    moments: tuple[Moment, ...]
    rotation: Rotation | None
    stacked: bool = False
    damping: float | None = None
    gradients: Moment | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the moments, and about those of the feedback; only of that once it is made."""
        if not self.moments:
            return self.feedback.nbytes
        moments = self.moments if self.gradients is None else (*self.moments, self.gradients)
        return sum((3 if moment.held_out is None else 4) * moment.matrix.nbytes for moment in moments)

    @cached_property
    def feedback(self) -> Feedback | StackFeedback:
        """Made once, for all weights that share it; the moments, which are as large, are then forgotten.

        Raises `QuantizerError` if a moment is not square or not finite.
        """
        moments = self._taken()
        if self.stacked:
            return StackFeedback.of(moments)
        found = Feedback.of(moments.pop(), self.damping)
        return found if self.gradients is None else found.and_of(self.gradients)

    def expected(self) -> Expected:
        """What the feedback would be expected to leave; the moments are then forgotten. Raises as `feedback` does."""
        if not self.stacked and self.gradients is None and self.damping is None:
            return Feedback.expected(self._taken().pop())
        return Expected(self.feedback.share, self.feedback.damping)

    def _taken(self) -> list[Moment]:
        """The moments in the basis of the weight, of which nothing else is left."""
        moments = list(self.moments)
        self.moments = ()
        return moments if self.rotation is None else _rotated(moments, self.rotation)


def _rotated(moments: list[Moment], rotation: Rotation) -> list[Moment]:
    """All moments rotated, matrix after matrix, each dropped as soon as it is. Leaves the list empty."""
    found = []
    while moments:
        moment = moments.pop(0)
        held_out, moment = moment.held_out, replace(moment, held_out=None)
        held_out = None if held_out is None else held_out.rotated(rotation)
        found.append(replace(moment.rotated(rotation), held_out=held_out))
    return found


def factored(source: Unfactored) -> Feedback | StackFeedback:
    """Its feedback, as a function that can be spread."""
    return source.feedback


def expected(source: Unfactored) -> Expected:
    """What its feedback would be expected to leave, as a function that can be spread."""
    return source.expected()
