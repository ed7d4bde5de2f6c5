"""What feedback is expected to leave of the error of each weight, noted in the journal of a compile weight by weight."""

from typing import ClassVar

from qpc.passes.feedbacks import Key, Known
from qpc.quant.feedback import Expected, Feedback, StackFeedback
from qpc.work_in_progress import WorkInProgress


class NotedShares(Known):
    """A `Known` that is there again after an interruption, and keeps no matrix of any feedback: the model may be larger than memory."""

    matrices: ClassVar[bool] = False

    def __init__(self, work: WorkInProgress, expected: dict[Key, Expected]) -> None:
        super().__init__(expected)
        self._work = work

    @staticmethod
    def of(work: WorkInProgress) -> "NotedShares":
        """What the journal knows."""
        noted = [entry for entry in work.entries if "share" in entry]
        return NotedShares(work, {(entry["weight"], entry["signs"]): Expected(entry["share"], entry["damping"]) for entry in noted})

    def keep(self, key: Key, feedback: Feedback | StackFeedback | Expected) -> None:
        """Note what is expected."""
        weight, signs = key
        self.expected[key] = Expected(feedback.share, feedback.damping)
        self._work.record(step=f"share {weight}", weight=weight, signs=signs, share=feedback.share, damping=feedback.damping)
