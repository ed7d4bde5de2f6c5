"""Language models compiled once for all test files of a process."""

import copy
from functools import cache

import torch
from torch import Tensor, nn

import qpc
from qpc.kernels.embedding import QuantizedEmbedding
from qpc.kernels.linear import QuantizedLinear
from tests.families import FAMILIES

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
BUDGET = 3.5
TOKENS = torch.arange(40).reshape(2, 20) % 60


@cache
def compiled_pair(family: str, device: str = "cpu") -> tuple[nn.Module, nn.Module]:
    """A tiny model of the family and what `qpc.compile` makes of it, untuned on every device. Nobody may change either."""
    original = FAMILIES[family]().eval().to(device)
    return original, qpc.compile(original, budget=BUDGET, effort="fast", tune="off")


class Rows(nn.Module):
    """The rows of a restored table, times a scale."""

    def __init__(self, table: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.table, self.scale = table.to(scale.dtype), scale

    def forward(self, indices: Tensor) -> Tensor:
        return self.table[indices] * self.scale


def dequantized(compiled: nn.Module) -> nn.Module:
    """The oracle: restored weights in plain linears and tables in the place of the packed ones, everything else as it is."""
    twin = copy.deepcopy(compiled)
    for name, module in compiled.named_modules():
        if isinstance(module, QuantizedLinear):
            plain = nn.Linear(module.in_features, module.out_features, device="meta")
            plain.weight, plain.bias = nn.Parameter(module.packed.restored()), module.bias
            twin.set_submodule(name, plain)
        elif isinstance(module, QuantizedEmbedding):
            twin.set_submodule(name, Rows(module.packed.restored(), module.scale))
    return twin


def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    """Logits of a batch of tokens, on the device of the model."""
    with torch.no_grad():
        result: Tensor = model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False).logits
    return result
