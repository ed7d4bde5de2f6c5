"""Exports of models of transformers, made once for each structure in a process: most of the time that a tiny model takes to compile.

What `torch.export` makes of a model depends on classes, configuration, shapes and dtypes, not on values. A model with hooks, or with a
forward of its own, is exported each time, and so is every module that is not from transformers.
"""

import copy
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature

from qpc.ir.program import named_tensors

Export = Callable[[nn.Module, tuple[Tensor, ...] | None], ExportedProgram]


@dataclass(frozen=True)
class Kept:
    """The parts of an export that a capture reads."""

    graph_module: fx.GraphModule
    graph_signature: ExportGraphSignature
    constants: dict[str, Any]

    def fresh(self) -> "Kept":
        """With a graph of its own, as captures change it."""
        graph_module = fx.GraphModule(self.graph_module, copy.deepcopy(self.graph_module.graph))
        return Kept(graph_module, self.graph_signature, self.constants)


def kept(export: Export) -> Callable[[nn.Module, tuple[Tensor, ...] | None], ExportedProgram | Kept]:
    """The same function, but of each structure that `structure` knows the first result, every time with a graph of its own."""
    known: dict[Hashable, Kept] = {}

    @wraps(export)
    def memorized(model: nn.Module, example_inputs: tuple[Tensor, ...] | None) -> ExportedProgram | Kept:
        key = None if example_inputs is not None else structure(model)
        if key is None:
            return export(model, example_inputs)
        if key not in known:
            exported = export(model, example_inputs)
            known[key] = Kept(exported.graph_module, exported.graph_signature, exported.constants)
        return known[key].fresh()

    return memorized


def structure(model: nn.Module) -> Hashable | None:
    """All that an export of a model depends on; None if that is more than can be listed."""
    if not type(model).__module__.startswith("transformers."):
        return None
    modules = []
    for name, module in model.named_modules(remove_duplicate=False):
        foreign = not type(module).__module__.startswith(("transformers.", "torch.nn."))
        if foreign or "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return None
        modules.append((name, type(module), module.training))
    order: dict[int, int] = {}
    tensors = [
        (name, tuple(value.shape), value.dtype, value.device, order.setdefault(id(value), len(order)), isinstance(value, nn.Parameter))
        for name, value in named_tensors(model).items()
    ]
    config: Any = model.config
    chosen = (config._attn_implementation, getattr(config, "_experts_implementation", None))
    return (config.to_json_string(use_diff=False), chosen, tuple(modules), tuple(tensors))
