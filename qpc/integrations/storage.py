"""`qpc.save` and `qpc.load`: a checkpoint together with the configuration and tokenizer of a transformers model."""

import copy
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qpc import checkpoint
from qpc.compiler import report_of
from qpc.errors import SettingsError
from qpc.integrations import transformers as hf
from qpc.integrations.compilation import adopted
from qpc.integrations.model_card import CARD, model_card
from qpc.integrations.tensorrt import Runtime, attach
from qpc.output_directory import replacing
from qpc.tensor_files import SHARD_BYTES

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    tokenizer_from: str | os.PathLike[str] | None = None,
    measured_kl: float | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a compiled model; the directory appears whole or not at all.

    A model of transformers gets a model card, unless the directory had a README.md, which it keeps.

    tokenizer_from: a directory whose tokenizer files are copied along. measured_kl: nats per token from the original, for the card.
    shard_bytes: tensors beyond this go into another file.
    Raises `CheckpointError` if the place is taken or cannot be written.
    """
    with replacing(directory, overwrite) as partial:
        checkpoint.write(model, partial, shard_bytes)
        write_companions(model, partial, Path(directory) / CARD, tokenizer_from, measured_kl)


def write_companions(
    model: nn.Module,
    directory: Path,
    kept_card: Path,
    tokenizer_from: str | os.PathLike[str] | None = None,
    measured_kl: float | None = None,
) -> None:
    """Write what stands beside manifest and tensors: configuration, model card and tokenizer. kept_card: taken instead if it exists."""
    if hf.is_pretrained(model):
        write_configuration(model, directory)
        card = model_card(report_of(model), hf.base_model(model), measured_kl)
        (directory / CARD).write_text(card, encoding="utf-8")
    if tokenizer_from is not None:
        hf.copy_tokenizer_files(Path(tokenizer_from), directory)
    if kept_card.is_file():
        shutil.copyfile(kept_card, directory / CARD)


def write_configuration(model: Any, directory: Path) -> None:
    """Write config.json, which names the quantization method, and generation_config.json, as `save_pretrained` does."""
    from qpc.integrations.hf_config import QPaletteConfig

    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.quantization_config = QPaletteConfig.of(report_of(model))
    config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)


def load(
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: torch.device | str = "cpu",
    runtime: Runtime | str = Runtime.PYTORCH,
    verify: bool = False,
    tp: "int | str | DeviceMesh | None" = None,
) -> nn.Module:
    """Read a compiled model, or a part of one.

    model: for modules that are not of transformers, a fresh one of the same class; its linears are replaced in place.
    runtime: what runs the operators that are not of qpc: "pytorch", or "tensorrt", which needs torch_tensorrt and a GPU.
    verify: check every tensor by its checksum, as `qpc.verify` does; takes about as long again as reading.
    tp: how many processes share the model by tensor parallelism, "auto" for as many as there are, or their mesh of one axis; each of them
        must call this. With torchrun nothing else is needed. "cuda" is then the GPU of the process.
    Raises `CheckpointError` if the checkpoint is missing, damaged, of an unknown version, or does not fit the model; `SettingsError` if the
    runtime is unknown or cannot be had. With tp also `SettingsError` if the processes are not there, `ModelError` if the model has no plan
    to be split by, `CheckpointError` if its packed weights cannot be split by it.
    """
    chosen = Runtime.parse(runtime)
    if tp is not None:
        from qpc.integrations.parallel.processes import join

        joined = join(tp, device)
        if joined is not None:
            if chosen is Runtime.TENSORRT:
                raise SettingsError(f"runtime={str(chosen)!r} does not run parts of a model; load it without tp")
            from qpc.integrations.parallel.loading import load_part

            return adopted(load_part(directory, model, *joined, verify))
    checkpoint.read_manifest(directory)
    result = adopted(checkpoint.read_into(hf.skeleton(Path(directory)) if model is None else model, directory, device, verify=verify))
    return attach(result) if chosen is Runtime.TENSORRT else result
