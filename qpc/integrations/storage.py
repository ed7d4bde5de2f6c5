"""`qpc.save` and `qpc.load`: a checkpoint together with the configuration and tokenizer of a transformers model."""

import os
from pathlib import Path

import torch
from torch import nn

from qpc import checkpoint
from qpc.integrations import transformers as hf


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    tokenizer_from: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a compiled model; the directory appears whole or not at all.

    tokenizer_from: a directory whose tokenizer files are copied along.
    Raises `CheckpointError` if the place is taken or cannot be written.
    """
    with checkpoint.replacing(directory, overwrite) as partial:
        checkpoint.write(model, partial)
        config = getattr(model, "config", None)
        if config is not None and hasattr(config, "save_pretrained"):
            config.save_pretrained(partial)
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(partial)
        if tokenizer_from is not None:
            hf.copy_tokenizer_files(Path(tokenizer_from), partial)


def load(directory: str | os.PathLike[str], model: nn.Module | None = None, *, device: torch.device | str = "cpu") -> nn.Module:
    """Read a compiled model.

    model: for modules that are not of transformers, a fresh one of the same class; its linears are replaced in place.
    Raises `CheckpointError` if the checkpoint is missing, damaged, of an unknown version, or does not fit the model.
    """
    checkpoint.read_manifest(directory)
    return checkpoint.read_into(hf.skeleton(Path(directory)) if model is None else model, directory, device)
