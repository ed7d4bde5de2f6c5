"""Packed stacks of experts in the manifest of a checkpoint: one entry for each, by the name of the parameter in whose place it is."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qpc.errors import CheckpointError
from qpc.kernels.experts import QuantizedExperts, RoutedExperts, place_experts, routes_experts
from qpc.quant import palette

SIZES = ("experts", "out_features", "in_features", "block")
"""Counts of an entry. out_features: of each expert. block: of the rotation; 0 means none."""


def experts_entries(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The entries of a compiled model."""
    return {
        name: {
            "experts": module.experts,
            "out_features": module.rows,
            "in_features": module.in_features,
            "quantizer": palette.to_json(module.quantizer),
            "block": module.block,
        }
        for name, module in model.named_modules()
        if isinstance(module, QuantizedExperts)
    }


def place_stored_experts(model: nn.Module, entries: Mapping[str, Any]) -> None:
    """Put packed stacks without tensors where the entries name them. Raises `CheckpointError` if the model has other shapes."""
    for name, entry in entries.items():
        experts, out_features, in_features, block = (_count(name, entry, key) for key in SIZES)
        owner, _, leaf = name.rpartition(".")
        try:
            module = model.get_submodule(owner)
            stack = getattr(module, leaf)
        except AttributeError:
            raise CheckpointError(
                f"the checkpoint packs {name}, which this model does not have; load it into the model it was made from"
            ) from None
        if not isinstance(module, RoutedExperts) and not routes_experts(module):
            raise CheckpointError(f"{owner} is {type(module).__name__}, whose experts cannot be packed; use the transformers that wrote it")
        found = tuple(stack.shape) if isinstance(stack, Tensor) else None
        shape = (experts, in_features, out_features) if module.is_transposed else (experts, out_features, in_features)
        if found != shape or (block and in_features % block):
            raise CheckpointError(f"{name} is {shape} (blocks of {block}) in the checkpoint, {found} in the model")
        quantizer = palette.from_json(entry.get("quantizer"))
        place_experts(model, name, QuantizedExperts(experts, out_features, in_features, quantizer, block))


def _count(name: str, entry: object, key: str) -> int:
    value = entry.get(key) if isinstance(entry, Mapping) else None
    if not isinstance(value, int) or isinstance(value, bool) or value < (0 if key == "block" else 1):
        raise CheckpointError(f"{key} of {name} is {value!r}, it must be a count; the checkpoint is damaged")
    return value
