"""Sampled tokens on disk, by the weights of the model that made them: the second compile of a model need not sample again."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from qpc import cache

FORMAT = 1
"""Version of the files and of the way in which they are sampled; part of their names."""


def key(model: nn.Module, settings: dict[str, Any]) -> str:
    """A digest of everything that decides what a model samples."""
    return cache.key(model, FORMAT, settings)


def read(directory: Path, name: str) -> Tensor | None:
    """The tokens of this key, int64 [sequences, length], if they are there and whole."""
    content = cache.read(directory, f"{name}.safetensors")
    try:
        tokens = None if content is None else load(content)["tokens"]
    except (SafetensorError, KeyError):
        return None
    return None if tokens is None else tokens.long()


def write(directory: Path, name: str, tokens: Tensor) -> None:
    """Keep tokens under this key, whole or not at all. Raises `SettingsError` if the directory cannot be written."""
    cache.write(directory, f"{name}.safetensors", save({"tokens": tokens.int()}))
