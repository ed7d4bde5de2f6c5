"""Reads what one process holds of a compiled model, and no more."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from qpc import checkpoint, tensor_files
from qpc.errors import CheckpointError
from qpc.integrations import transformers as hf
from qpc.integrations.parallel.parts import Part, Place, Site, check
from qpc.integrations.parallel.plan import Axis, splits_of
from qpc.integrations.parallel.processes import all_or_none
from qpc.integrations.parallel.styles import SplitColumns, SplitRows
from qpc.kernels.linear import QuantizedLinear
from qpc.verification import verify

NUMBER_DIGITS = 15
"""Of the checksum of a manifest, in hexadecimal: as much as processes compare."""


def load_part(
    directory: str | os.PathLike[str], model: nn.Module | None, mesh: DeviceMesh, device: torch.device, verified: bool
) -> nn.Module:
    """The part of a compiled model that this process holds. All processes of the mesh must call this, with the same checkpoint.

    model, verified: as for `qpc.load`. device: of this process.
    Raises `ModelError` if the model has no plan, `CheckpointError` if the checkpoint cannot be read or be split so; if it does in one
    process, it does in all.
    """

    def work() -> tuple[nn.Module, int]:
        manifest = checkpoint.read_manifest(directory)
        if verified and (problems := verify(directory).problems):
            raise CheckpointError(f"{directory}: {problems[0]}; copy the checkpoint again")
        whole = hf.skeleton(Path(directory)) if model is None else model
        number = int(checkpoint.manifest_checksum(manifest)[:NUMBER_DIGITS], 16)
        return _read(whole, manifest, directory, mesh, device), number

    return all_or_none(mesh, device, work)


def _read(
    model: nn.Module, manifest: dict[str, Any], directory: str | os.PathLike[str], mesh: DeviceMesh, device: torch.device
) -> nn.Module:
    aliases: dict[str, str] = manifest["aliases"]
    checkpoint.place(model, manifest)
    outlines = {name: tensor.outline() for name, tensor in tensor_files.headers(directory).items()}
    checkpoint.fitting(model, manifest, outlines, directory)
    places = _split(model, [*aliases, *aliases.values()], mesh)
    needed = {name: places.get(name, (aliases.get(name, name), ())) for name in model.state_dict(keep_vars=True)}
    tensors = tensor_files.read_parts(directory, dict(needed.values()), device)
    model.load_state_dict({name: tensors[stored] for name, (stored, _) in needed.items()}, assign=True, strict=False)
    model.to(device)
    checkpoint.settle(model, manifest)
    model.qpc_ranks = mesh.size()  # type: ignore[assignment]
    if hf.is_pretrained(model):
        model._tp_size = mesh.size()  # type: ignore[assignment]
    return model


def _split(model: nn.Module, tied: list[str], mesh: DeviceMesh) -> dict[str, tuple[str, Place]]:
    """Let the linears of a model without tensors hold a part each. Returns where the tensors of the parts are stored, by their names."""
    rank, ranks = mesh.get_local_rank(), mesh.size()
    sites = [Site.of(model, name, split) for name, split in splits_of(model, tied).items()]
    check(sites, ranks)
    styles: dict[str, ParallelStyle] = {}
    places: dict[str, tuple[str, Place]] = {}
    for site in sites:
        if site.can_share(ranks):
            part, linear, whole = Part.of(site, rank, ranks), model.get_submodule(site.name), site.split.whole
            assert isinstance(linear, nn.Linear | QuantizedLinear)
            places |= {f"{site.name}.{leaf}": (f"{site.name}.{there}", place) for leaf, (there, place) in part.places(linear).items()}
            rows = site.split.axis is Axis.ROWS
            styles[site.name] = SplitRows(part, site.share(ranks) if whole else None) if rows else SplitColumns(part, whole)
    parallelize_module(model, mesh, styles)
    return places
