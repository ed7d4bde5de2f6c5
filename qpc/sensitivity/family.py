"""Sensitivities of a model from those of another size of its family: linears of the same kinds, in another number of layers."""

import re
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from qpc.errors import ModelError
from qpc.ir.annotation import site_of
from qpc.ir.program import Program, Remark
from qpc.sensitivity.values import Sensitivities

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
"""The number of the layer in the name of a linear: the first of its parts that is a number."""

Kind = tuple[str, str]
"""What a name says before and after the number of the layer."""


def fitted(program: Program, known: Sensitivities) -> tuple[Sensitivities, tuple[Remark, ...]]:
    """The sensitivities of the linears of a program, and what is to be said of them; as they are, if they are those of its model.

    Where linears are missing, or layers are known that the model does not have, a linear gets what those of its kind have at the same
    relative depth, between two layers in proportion; times the ratio of the numbers of layers, so that a kind matters as much as a whole.

    Raises `ModelError` that names a linear of which nothing is known.
    """
    wanted = [site_of(node).name for node in program.linears()]
    layers, there = _layers(name for name, _ in program.module.named_modules()), _layers(known.values)
    if set(wanted) <= known.values.keys() and there <= layers:
        return known, ()
    kinds: dict[Kind, dict[float, float]] = {}
    for name, value in known.values.items():
        kind, layer = _kind(name)
        kinds.setdefault(kind, {})[layer / max(1, there - 1)] = value
    values = {}
    for name in wanted:
        kind, layer = _kind(name)
        if kind not in kinds:
            raise ModelError(
                f"the sensitivities have no value for {name}, nor for linears like it in other layers; estimate them for this model"
            )
        depths, found = zip(*sorted(kinds[kind].items()), strict=True)
        values[name] = float(np.interp(layer / max(1, layers - 1), depths, found)) * there / layers
    told = f"those of a model of {there} layers stand for the {layers} of this one"
    return replace(known, values=values, linearity=None), (Remark("sensitivities", type(program.module).__name__, told),)


def _kind(name: str) -> tuple[Kind, int]:
    """The kind of a linear and its layer; a name without a number is in layer 0."""
    found = _LAYER.search(name)
    return ((name, ""), 0) if found is None else ((name[: found.start()], name[found.end() :]), int(found.group()))


def _layers(names: Iterable[str]) -> int:
    """How many layers there are, by the largest number in a name."""
    return 1 + max((_kind(name)[1] for name in names), default=0)
