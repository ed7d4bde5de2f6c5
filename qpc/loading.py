"""The models and tokenizers that commands are given the paths of."""

from pathlib import Path
from typing import Any

from torch import nn

import qpc
from qpc.arguments import pick_device
from qpc.errors import ModelError, UsageError


def load_original(path: Path, effort: str) -> tuple[nn.Module, Any | None]:
    """A model that is not compiled yet, with its tokenizer. Raises `QpcError` before it takes time if that or the effort is wrong."""
    from qpc.integrations.transformers import load_pretrained
    from qpc.quant.palette import Effort

    Effort.parse(effort)
    if qpc.is_checkpoint(path):
        raise UsageError(f"{path} is a compiled model already; give the original")
    return load_pretrained(path)


def load_any(path: Path, device: str | None) -> tuple[nn.Module, Any | None]:
    """A compiled or a plain model with its tokenizer, on the device."""
    from qpc.integrations.transformers import load_pretrained, load_tokenizer

    where = pick_device(device)
    if qpc.is_checkpoint(path):
        return qpc.load(path, device=where), load_tokenizer(path)
    model, tokenizer = load_pretrained(path)
    return model.to(where), tokenizer


def required(tokenizer: Any | None, model: Path) -> Any:
    """The tokenizer. Raises `ModelError` if there is none."""
    if tokenizer is None:
        raise ModelError(f"{model} has no tokenizer; put its tokenizer files (tokenizer.json, tokenizer_config.json) there")
    return tokenizer
