"""Language models compiled once for all test files of a process."""

from functools import cache

import torch
from torch import Tensor, nn

import qpc
from tests.families import FAMILIES

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
BUDGET = 3.5
TOKENS = torch.arange(40).reshape(2, 20) % 60


@cache
def compiled_pair(family: str, device: str = "cpu") -> tuple[nn.Module, nn.Module]:
    """A tiny model of the family and what `qpc.compile` makes of it, untuned on every device. Nobody may change either."""
    original = FAMILIES[family]().eval().to(device)
    return original, qpc.compile(original, budget=BUDGET, effort="fast", tune="off")


def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    """Logits of a batch of tokens, on the device of the model."""
    with torch.no_grad():
        result: Tensor = model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False).logits
    return result
