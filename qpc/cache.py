"""What can be made again, kept in files named by the weights of the model that it was made from."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qpc.errors import SettingsError


def key(model: nn.Module, version: int, settings: dict[str, Any]) -> str:
    """A digest of everything that a result depends on: class, configuration, device, every tensor, and the settings.

    version: of the way in which the result is made, and of its file.
    """
    config: Any = getattr(model, "config", None)
    described = {} if config is None else config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        described.pop(name, None)
    digest = hashlib.sha256()
    device = next((str(value.device.type) for value in model.parameters()), "cpu")
    head = {"format": version, "class": type(model).__name__, "device": device, "config": described, "settings": settings}
    digest.update(json.dumps(head, sort_keys=True, default=str).encode())
    for name, value in model.state_dict(keep_vars=True).items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def read(directory: Path, name: str) -> bytes | None:
    """The content of a file, if it can be read."""
    try:
        return (directory / name).read_bytes()
    except OSError:
        return None


def write(directory: Path, name: str, content: bytes) -> None:
    """Keep a file, whole or not at all. Raises `SettingsError` if the directory cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{name}-", dir=directory)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(partial).replace(directory / name)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise SettingsError(f"cannot keep {name} in {directory}: {error.strerror or error}; set QPC_CACHE to another directory") from error
