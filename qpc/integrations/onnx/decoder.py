"""A causal language model with plain tensors for inputs and outputs, traced to one graph."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram

from qpc.errors import ModelError
from qpc.sampling import cache_name

# Traced sizes; any that differ and are not usual constants will do.
_BATCH, _LENGTH, _PAST = 2, 3, 5

_MODEL = "model"
"""The attribute of `Decoder` that holds the model; the names of its tensors begin so."""


@dataclass(frozen=True)
class Traced:
    """A program of a decoder, and what its inputs and outputs are called."""

    program: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @staticmethod
    def name_in_model(name: str) -> str:
        """What the model calls a tensor of the program."""
        return name.removeprefix(f"{_MODEL}.")


class Decoder(nn.Module):
    """`(input_ids, attention_mask, past) -> (logits, present)`, where past and present are lists of keys and values, layer by layer.

    A token's position is the number of tokens before it that are not masked.
    """

    def __init__(self, model: nn.Module, cache: bool) -> None:
        super().__init__()
        self.add_module(_MODEL, model)
        self.cache = cache

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """past: empty without a cache."""
        from transformers import DynamicCache

        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        model: Any = self.get_submodule(_MODEL)
        options: dict[str, Any] = {"use_cache": False}
        cache: Any = None
        if self.cache:
            cache = DynamicCache()
            for layer in range(len(past) // 2):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            options = {"use_cache": True, cache_name(model): cache}
        result = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, **options)
        present = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)] if self.cache else []
        return result.logits, present


def trace(model: nn.Module, cache: bool) -> Traced:
    """The program of a model in float32. Raises `ModelError` if it cannot be traced, or is no language model."""
    if not hasattr(model, "config"):
        raise ModelError(f"{type(model).__name__} is not a causal language model of transformers; only those are exported")
    batch, length = Dim("batch"), Dim("length")
    past_length = Dim("past", min=0) if cache else None
    total = Dim.DYNAMIC if cache else length
    try:
        with quiet(), torch.no_grad():
            shapes = cache_shapes(model) if cache else []
            past = [torch.zeros(_BATCH, heads, _PAST, features) for heads, features in shapes]
            ids = torch.zeros(_BATCH, _LENGTH, dtype=torch.int64)
            mask = torch.ones(_BATCH, _LENGTH + (_PAST if cache else 0), dtype=torch.int64)
            sizes = ({0: batch, 1: length}, {0: batch, 1: total}, [{0: batch, 2: past_length} for _ in past])
            program = torch.export.export(Decoder(model, cache), (ids, mask, past), dynamic_shapes=sizes, strict=False)
    except Exception as error:
        raise ModelError(f"{type(model).__name__} cannot be traced for ONNX: {first_line(error)}") from error
    layers = [f"{layer}.{kind}" for layer in range(len(shapes) // 2) for kind in ("key", "value")]
    inputs = ("input_ids", "attention_mask", *(f"past_key_values.{name}" for name in layers))
    return Traced(program, inputs, ("logits", *(f"present.{name}" for name in layers)))


def cache_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(heads, features) of keys, then of values, layer by layer, by a run on fake tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        result = model(input_ids=torch.zeros(1, _LENGTH, dtype=torch.int64), use_cache=True)
    tensors = [tensor for layer in getattr(result, cache_name(model)).layers for tensor in (layer.keys, layer.values)]
    return [(tensor.shape[1], tensor.shape[3]) for tensor in tensors]


@contextmanager
def quiet() -> Iterator[None]:
    """Without what PyTorch's exporters log and warn of: packages that are not there, their own deprecations."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def first_line(error: BaseException) -> str:
    """The first line of somebody else's innermost error, with its type."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"
