"""What a pass is. One frozen dataclass per pass and file; its fields are its options."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from qpc.ir.program import Program, Remark
from qpc.ir.stage import Stage


@dataclass(frozen=True)
class PassResult:
    """What a pass did: names of the nodes or sites that it changed, and why it left others alone."""

    changed: tuple[str, ...] = ()
    remarks: tuple[Remark, ...] = field(default=())


class Pass(ABC):
    """A step of the pipeline. Requires one stage, ensures another; changes the program in place."""

    name: ClassVar[str]
    requires: ClassVar[Stage]
    ensures: ClassVar[Stage]

    @abstractmethod
    def run(self, program: Program) -> PassResult:
        """Do the work. The pipeline sets `program.stage` and collects the remarks."""

    def declined(self, subject: str, reason: str) -> Remark:
        """A remark of this pass."""
        return Remark(self.name, subject, reason)
