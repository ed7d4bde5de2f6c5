"""What the plan of a model of transformers says about its linears."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import nn

from qpc.errors import ModelError
from qpc.kernels.linear import QuantizedLinear


class Axis(Enum):
    """Of a weight [out_features, in_features]."""

    ROWS = "rows"
    COLUMNS = "columns"


@dataclass(frozen=True)
class Split:
    """Which axis of a weight is split. whole: the value on its side is the same in all processes: outputs of rows are gathered, inputs of
    columns cut. Otherwise each process keeps its own, so that it must be split in equal parts."""

    axis: Axis
    whole: bool


STYLES: Mapping[str, Split | None] = {
    "colwise": Split(Axis.ROWS, whole=False),
    "colwise_gather_output": Split(Axis.ROWS, whole=True),
    "colwise_rep": Split(Axis.ROWS, whole=True),
    "rowwise": Split(Axis.COLUMNS, whole=False),
    "rowwise_split_input": Split(Axis.COLUMNS, whole=True),
    "rowwise_rep": Split(Axis.COLUMNS, whole=True),
    "replicate": None,
    "replicated_with_grad_allreduce": None,
    "embedding_rowwise": None,
    "embedding_colwise": None,
}
"""How transformers calls them, in version 5 and in version 4; None for what every process holds as a whole, embeddings among them."""


LAYER = re.compile(r"\.\d+(?=\.|$)")
"""The number of a layer in a name."""


def splits_of(model: nn.Module, tied: Iterable[str]) -> dict[str, Split]:
    """How each linear is split, by name; the others are held by every process.

    tied: names of tensors that share their memory with another; a linear that has one is not split, if its outputs are gathered.
    Raises `ModelError` if the model has no plan, or one that cannot be followed.
    """
    plan: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    if not plan:
        raise ModelError(f"transformers has no plan of tensor parallelism for {type(model).__name__}; load it without tp")
    owners = {name.rpartition(".")[0] for name in tied}
    found: dict[str, Split] = {}
    for name, style in _matches(model, plan):
        if style not in STYLES:
            raise ModelError(
                f"the plan of {type(model).__name__} has {style!r} for {name}, which cannot be followed: "
                "linears are split, experts are not; load it without tp"
            )
        split = STYLES[style]
        if split is None or (split.whole and name in owners):
            continue
        if name in owners or not isinstance(_at(model, name), nn.Linear | QuantizedLinear):
            raise ModelError(
                f"the plan of {type(model).__name__} splits {name}, which is no linear with a weight of its own; load it without tp"
            )
        found[name] = split
    if not any(LAYER.search(name) for name in found):
        raise ModelError(f"the plan that transformers has for {type(model).__name__} splits none of its layers; load it without tp")
    return found


def _matches(model: nn.Module, plan: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Modules and parameters that a plan names, with their styles; a star stands for a number. What the model lacks is passed over."""
    modules: Iterable[tuple[str, Any]] = model.named_modules()
    names = dict.fromkeys([name for name, _ in modules] + [name for name, _ in model.named_parameters()])
    general: dict[str, list[str]] = {}
    for name in names:
        general.setdefault(LAYER.sub(".*", name), []).append(name)
    for pattern, style in plan.items():
        for name in general.get(pattern, []):
            yield name, style


def _at(model: nn.Module, name: str) -> object:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)
