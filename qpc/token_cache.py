"""Sampled tokens on disk, by the weights of the model that made them: the second compile of a model need not sample again."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from qpc.errors import SettingsError

FORMAT = 1
"""Version of the files and of the way in which they are sampled; part of their names."""


def key(model: nn.Module, settings: dict[str, Any]) -> str:
    """A digest of everything that decides what a model samples: class, configuration, device, every tensor, and the settings."""
    config: Any = getattr(model, "config", None)
    described = {} if config is None else config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        described.pop(name, None)
    digest = hashlib.sha256()
    device = next((str(value.device.type) for value in model.parameters()), "cpu")
    head = {"format": FORMAT, "class": type(model).__name__, "device": device, "config": described, "settings": settings}
    digest.update(json.dumps(head, sort_keys=True, default=str).encode())
    for name, value in model.state_dict(keep_vars=True).items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def read(directory: Path, name: str) -> Tensor | None:
    """The tokens of this key, int64 [sequences, length], if they are there and whole."""
    try:
        tokens = load((directory / f"{name}.safetensors").read_bytes())["tokens"]
    except (OSError, SafetensorError, KeyError):
        return None
    return tokens.long()


def write(directory: Path, name: str, tokens: Tensor) -> None:
    """Keep tokens under this key, whole or not at all. Raises `SettingsError` if the directory cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{name}-", dir=directory)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(save({"tokens": tokens.int()}))
            Path(partial).replace(directory / f"{name}.safetensors")
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise SettingsError(f"cannot keep samples in {directory}: {error.strerror or error}; set QPC_CACHE to another directory") from error
