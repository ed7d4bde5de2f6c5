"""A small picture of one block of a model: a few boxes and arrows, as a value that JSON can hold."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from qpc.errors import CheckpointError


class Role(StrEnum):
    """What a box stands for."""

    INPUT = "input"
    OUTPUT = "output"
    LINEAR = "linear"
    TRANSFORM = "transform"
    OTHER = "other"


@dataclass(frozen=True)
class Box:
    """One linear, one transform, or all operators of a module that hang together.

    name: qualified name of the module, empty for input and output. label: a word or two. group: names of the linears that one kernel runs,
    itself included; empty if it is no linear. operators: what it computes, in order, without views and casts.
    """

    role: Role
    label: str
    name: str = ""
    group: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sketch:
    """Boxes in an order in which they can be computed, and arrows from box to box, by number.

    Raises `CheckpointError` if an arrow does not lead from one box to a later one.
    """

    boxes: tuple[Box, ...]
    arrows: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        for source, target in self.arrows:
            if not 0 <= source < target < len(self.boxes):
                raise CheckpointError(f"an arrow from box {source} to box {target} of {len(self.boxes)} must lead to a later box")


@dataclass(frozen=True)
class Block:
    """One block, before it was lowered and after. name: of its module ("model.layers.15")."""

    name: str
    before: Sketch
    after: Sketch

    def to_json(self) -> dict[str, Any]:
        """A value that `json.dumps` takes and `from_json` gives back unchanged."""
        return asdict(self)

    @staticmethod
    def from_json(value: object) -> "Block":
        """The inverse of `to_json`. Raises `CheckpointError` for anything else."""
        try:
            match value:
                case {"name": str(name), "before": before, "after": after, **rest} if not rest:
                    return Block(name, _sketch(before), _sketch(after))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"report.block is malformed: {error}") from error
        raise CheckpointError("report.block must be an object of name, before and after")


def _sketch(value: Any) -> Sketch:
    boxes = [
        Box(Role(box["role"]), str(box["label"]), str(box["name"]), tuple(map(str, box["group"])), tuple(map(str, box["operators"])))
        for box in value["boxes"]
    ]
    return Sketch(tuple(boxes), tuple((int(source), int(target)) for source, target in value["arrows"]))
