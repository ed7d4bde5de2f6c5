"""The modules that take the place of a mixture of experts once its weights are packed."""

from typing import Any

import torch
from torch import Tensor, nn

from qpc.kernels.linear import operator
from qpc.kernels.packed_module import PackedModule
from qpc.quant.experts import EXPERT_LINEAR
from qpc.quant.quantizer import PackedWeight, Quantizer

_OF_STACKS = {
    torch.ops.qpc.trellis_linear.default: torch.ops.qpc.trellis_expert_linear.default,
    torch.ops.qpc.scalar_linear.default: torch.ops.qpc.scalar_expert_linear.default,
    torch.ops.qpc.vector_linear.default: torch.ops.qpc.vector_expert_linear.default,
}


def expert_operator(quantizer: Quantizer, in_features: int) -> tuple[torch._ops.OpOverload, tuple[object, ...]]:
    """The operator that runs stacks of a quantizer's family, and its arguments that describe the code."""
    target, code = operator(quantizer, in_features)
    return _OF_STACKS[target], code


class QuantizedExperts(PackedModule):
    """A packed stack of matrices: `y[r] = W[expert[r]] x[r]`. Takes the place of the parameter [experts, out_features, in_features].

    As a `PackedModule` it is one weight of experts * rows outputs; rows is out_features of each expert.
    """

    def __init__(self, experts: int, rows: int, in_features: int, quantizer: Quantizer, block: int) -> None:
        """An empty one, on the meta device."""
        super().__init__(experts * rows, in_features, quantizer, block)
        self.experts, self.rows = experts, rows
        self._operator, self._code = expert_operator(quantizer, in_features)

    @staticmethod
    def from_packed(packed: PackedWeight, experts: int) -> "QuantizedExperts":
        """A module that shares the tensors of `packed`."""
        block = packed.rotation.block if packed.rotation else 0
        return QuantizedExperts(experts, packed.out_features // experts, packed.in_features, packed.quantizer, block).take(packed)

    def forward(self, x: Tensor, expert: Tensor, copies: int = 1) -> Tensor:
        """Multiply tokens by the experts that are chosen for them.

        x: [tokens, in_features]. expert: int64 [tokens * copies], those of one token after those of the one before.
        Returns [tokens * copies, rows] in the dtype of `x`.
        """
        rotated = torch.ops.qpc.rotate(x, self.signs, self.block) if self.block else x
        rows = rotated.repeat_interleave(copies, dim=0) if copies > 1 else rotated
        result: Tensor = self._operator(rows, list(self.codes), self.scales, expert, *self._code, self.rows, self.experts)
        return result

    def extra_repr(self) -> str:
        return f"{self.experts} x ({self.in_features} -> {self.rows}), {self.quantizer}"


class RoutedExperts(nn.Module):
    """Takes the place of a module of transformers that holds stacks of experts, of which some are packed: `routes_experts`.

    It has the parameters and attributes of that module, under their names; what happens between the two products is that module's own gate.
    """

    act_fn: Any
    has_gate: bool
    has_bias: bool
    is_transposed: bool

    def __init__(self, experts: nn.Module) -> None:
        """experts: stays as it is; all but its dictionaries is shared."""
        super().__init__()
        own = {key: dict(value) if isinstance(value, dict) else value for key, value in vars(experts).items()}
        vars(self).update(own)
        self._gate: Any = getattr(type(experts), "_apply_gate")  # noqa: B009 - torch knows of no such method

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states: [tokens, features]. top_k_index, top_k_weights: [tokens, chosen experts]. Returns [tokens, features]."""
        copies = top_k_index.shape[-1]
        expert = top_k_index.reshape(-1)
        rows = self._product("gate_up_proj" if self.has_gate else "up_proj", hidden_states, expert, copies)
        rows = self._gate(self, rows) if self.has_gate else self.act_fn(rows)
        rows = self._product("down_proj", rows, expert, 1)
        if getattr(self, "has_post_expert_norm", False):
            rows = self.post_expert_norm(rows)  # type: ignore[operator]
        rows = rows * top_k_weights.reshape(-1, 1)
        return rows.view(-1, copies, rows.shape[-1]).sum(dim=1).to(hidden_states.dtype)

    def _product(self, name: str, x: Tensor, expert: Tensor, copies: int) -> Tensor:
        stack: Any = getattr(self, name)
        if isinstance(stack, QuantizedExperts):
            made: Tensor = stack(x, expert, copies)
        else:
            rows = x.repeat_interleave(copies, dim=0) if copies > 1 else x
            made = EXPERT_LINEAR(rows.to(stack.dtype), stack.mT if self.is_transposed else stack, expert, len(stack))
        return made + getattr(self, f"{name}_bias")[expert] if self.has_bias else made


def routes_experts(module: nn.Module) -> bool:
    """Whether a module is experts of transformers whose multiplication can be exchanged, so that `RoutedExperts` can take its place."""
    return getattr(type(module).forward, "__globals__", {}).get("__name__") == "transformers.integrations.moe"


def place_experts(model: nn.Module, name: str, stack: QuantizedExperts) -> None:
    """Put a packed stack in the place of the parameter of this name, and `RoutedExperts` in that of the module that owns it."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if not isinstance(module, RoutedExperts):
        module = RoutedExperts(module)
        model.set_submodule(owner, module)
    delattr(module, leaf)
    setattr(module, leaf, stack)
