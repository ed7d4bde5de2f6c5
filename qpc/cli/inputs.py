"""What commands read: models with their tokenizers, texts, sensitivities; and the device that they run on."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import qpc
from qpc.errors import ModelError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from qpc.sensitivity import Sensitivities


def load_original(path: Path, effort: str = "default") -> "tuple[nn.Module, Any | None]":
    """A model that is not compiled yet, with its tokenizer. Raises `QpcError` before it takes time if that or the effort is wrong."""
    from qpc.integrations.transformers import load_pretrained
    from qpc.quant.palette import Effort

    Effort.parse(effort)
    if qpc.is_checkpoint(path):
        raise UsageError(f"{path} is a compiled model already; give the original")
    return load_pretrained(path)


def load_any(path: Path, device: str | None) -> "tuple[nn.Module, Any | None]":
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


def pick_device(name: str | None) -> str:
    """The device to run on. Raises `UsageError` if torch has no such device here."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return name


def read_text(path: Path) -> str:
    """A text file as it is. Raises `UsageError` if it is missing or not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; give a text file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error


def check_place(path: Path) -> None:
    """Raise `UsageError` if a file cannot be at a path, before it takes time to make it."""
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise UsageError(f"{path} cannot be written: {'it is a directory' if path.is_dir() else 'there is no such directory'}")


def write_text(path: Path, text: str) -> None:
    """Write a text file. Raises `UsageError` if that cannot be done."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; give another place") from error


def read_sensitivities(path: Path) -> "Sensitivities":
    """Sensitivities from a JSON file. Raises `QpcError` if it holds none."""
    from qpc.sensitivity import Sensitivities

    return Sensitivities.from_json(read_text(path))
