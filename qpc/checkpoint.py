"""Checkpoints: a directory of safetensors and JSON that any machine can read.

    qpc.json            what the tensors mean: format version, one entry per quantized linear, embedding and stack, and per gain that
                        folding left between two rotations, tied names, the report; and the checksums of all tensors and of itself
    model.safetensors   every tensor: those of quantized modules under their module's name (`codes0`, `codes1`, `scales`, `signs`, `bias`),
                        all others under the names that the model gives them; or shards with model.safetensors.index.json, as
                        transformers writes them
    config.json, generation_config.json, tokenizer files: as the original has them

Nothing in it depends on a kernel. A checkpoint is written beside its place and moved there when it is whole.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qpc import tensor_files
from qpc.compiler import report_of
from qpc.errors import CheckpointError
from qpc.inductor.hook import register
from qpc.kernels.embedding import QuantizedEmbedding
from qpc.kernels.gain import TurnedGain
from qpc.kernels.linear import QuantizedLinear, join
from qpc.kernels.packed_module import PackedModule, share_signs, tie, tied_groups
from qpc.plain_files import read_json
from qpc.quant import palette
from qpc.quant.quantizer import Quantizer
from qpc.quant.rotation import Rotation
from qpc.report import Report
from qpc.stored_experts import experts_entries, place_stored_experts
from qpc.tensor_files import METADATA, SHARD_BYTES
from qpc.tensor_files import TENSORS as TENSORS

FORMAT = "qpc"
FORMAT_VERSION = 3
MANIFEST = "qpc.json"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
"""Of the rows that an embedding makes, by name."""


def is_checkpoint(directory: str | os.PathLike[str]) -> bool:
    """Whether this is the directory of a compiled model."""
    return (Path(directory) / MANIFEST).is_file()


def write(model: nn.Module, directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write manifest and tensors of a compiled model into an existing directory. shard_bytes: most of one file."""
    cut = tensor_files.shards(stored(model), shard_bytes)
    for file, tensors in cut.items():
        save_file(tensors, directory / file, metadata=METADATA)
    tensor_files.write_index(directory, cut)
    write_manifest(model, directory)


def stored(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a checkpoint of the model, by name; those that share their memory are there once.

    Raises `CheckpointError` if the model is a part of one.
    """
    check_whole(model)
    tensors, _ = _distinct(model.state_dict(keep_vars=True))
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def check_whole(model: nn.Module) -> None:
    """Raise `CheckpointError` if other processes hold parts of a model."""
    ranks = getattr(model, "qpc_ranks", 1)
    if ranks > 1:
        raise CheckpointError(f"this is one of {ranks} parts of a model, which cannot be saved; load it without tp and save that")


def write_manifest(model: nn.Module, directory: Path, checksums: Mapping[str, str] | None = None) -> None:
    """Write what the tensors of a compiled model mean into an existing directory.

    checksums: of its stored tensors by name; None takes them.
    """
    if checksums is None:
        checksums = {name: tensor_files.checksum(tensor) for name, tensor in stored(model).items()}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    tables = {name: module for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, QuantizedEmbedding)}
    gains = {name: module for name, module in model.named_modules() if isinstance(module, TurnedGain)}
    entries: dict[str, Any] = {}
    for name, linear in linears.items():
        entries[name] = {
            "out_features": linear.out_features,
            "in_features": linear.in_features,
            "quantizer": palette.to_json(linear.quantizer),
            "block": linear.block,
            "bias": linear.bias is not None,
        }
    _, aliases = _distinct(model.state_dict(keep_vars=True))
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "linears": entries,
        "embeddings": {name: _embedding_entry(module) for name, module in tables.items()},
        "experts": experts_entries(model),
        "gains": {name: {"block": module.block, "offset": module.offset} for name, module in gains.items()},
        "aliases": aliases,
        "report": report_of(model).to_json(),
        "checksums": dict(checksums),
    }
    manifest["sha256"] = manifest_checksum(manifest)
    (directory / MANIFEST).write_text(_text(manifest), encoding="utf-8")


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest as it is written, without the line that holds it."""
    return hashlib.sha256(_text({key: value for key, value in manifest.items() if key != "sha256"}).encode()).hexdigest()


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The checked manifest of a checkpoint."""
    path = Path(directory) / MANIFEST
    if not Path(directory).is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    try:
        manifest = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no {MANIFEST}: it is not a checkpoint of qpc; make one with `qpc compile`") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; the checkpoint is damaged") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a manifest of qpc (format must be {FORMAT!r})")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version!r}, this qpc reads {FORMAT_VERSION}; use the version that wrote it")
    manifest.setdefault("gains", {})  # a checkpoint from before folding has none
    manifest.setdefault("experts", {})  # nor one from before stacks of experts
    for key in ("linears", "embeddings", "experts", "gains", "aliases", "report"):
        if not isinstance(manifest.get(key), dict):
            raise CheckpointError(f"{path} has no valid {key!r} section; the checkpoint is damaged")
    return manifest


def read_report(directory: str | os.PathLike[str]) -> Report:
    """The report of a checkpoint, without reading its tensors."""
    return Report.from_json(read_manifest(directory)["report"])


def read_quantizers(directory: str | os.PathLike[str]) -> dict[str, Quantizer]:
    """The quantizer of each quantized linear and embedding by name, without reading tensors."""
    manifest = read_manifest(directory)
    entries = manifest["linears"] | manifest["embeddings"] | manifest["experts"]
    return {name: palette.from_json(entry.get("quantizer") if isinstance(entry, dict) else None) for name, entry in entries.items()}


def tensor_bytes(directory: str | os.PathLike[str]) -> dict[str, int]:
    """Bytes of each tensor of a checkpoint by name, from the headers of its files."""
    return {name: tensor.nbytes for name, tensor in tensor_files.headers(directory).items()}


def read_into(
    model: nn.Module, directory: str | os.PathLike[str], device: torch.device | str = "cpu", *, verify: bool = False
) -> nn.Module:
    """Fill a model of the right class: quantized linears take their places, every parameter is replaced.

    model: its parameters may be on the meta device, its buffers that no checkpoint holds must be real. verify: check what was read by the
    checksums of the manifest; raises `CheckpointError` for what was changed since, or if there are none.
    """
    manifest = read_manifest(directory)
    place(model, manifest)
    tensors = read_tensors(model, manifest, directory, device)
    if verify:
        _check_sums(manifest, tensors, directory)
    model.load_state_dict(tensors, assign=True, strict=False)
    model.to(device)
    return settle(model, manifest)


def place(model: nn.Module, manifest: Mapping[str, Any]) -> None:
    """Put quantized modules without tensors where the manifest names them. Raises `CheckpointError` if the model has other shapes."""
    for name, entry in manifest["linears"].items():
        _place(model, name, entry)
    for name, entry in manifest["embeddings"].items():
        _place_embedding(model, name, entry)
    place_stored_experts(model, manifest["experts"])
    for name, entry in manifest["gains"].items():
        _place_gain(model, name, entry)


def read_tensors(
    model: nn.Module, manifest: Mapping[str, Any], directory: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """All that the state of a model with its quantized modules in place needs, by name.

    Raises `CheckpointError` if a tensor is missing, unknown, of another shape, or, where it is packed, of another dtype.
    """
    return fitting(model, manifest, tensor_files.read(directory, device), directory)


def fitting(
    model: nn.Module, manifest: Mapping[str, Any], tensors: dict[str, Tensor], directory: str | os.PathLike[str]
) -> dict[str, Tensor]:
    """Stored tensors, also under the names that share one. Raises `CheckpointError` as `read_tensors` does."""
    for alias, name in manifest["aliases"].items():
        if name not in tensors:
            raise CheckpointError(f"{alias} shares the tensor {name}, which {directory} lacks; the checkpoint is damaged")
        tensors[alias] = tensors[name]
    _check_tensors(model, tensors, directory)
    return tensors


def settle(model: nn.Module, manifest: Mapping[str, Any]) -> nn.Module:
    """Make one what is one in the checkpoint, once all tensors are there: tied names, groups, readers of one table. Returns the model.

    A name that stands on another device than the tensor it shares keeps a copy there.
    """
    for alias, name in manifest["aliases"].items():
        value, device = _get(model, name), _get(model, alias).device
        if device in (value.device, torch.device("meta")):
            _assign(model, alias, value)
        elif not isinstance(value, nn.Parameter):
            _assign(model, alias, value.to(device))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    result = Report.from_json(manifest["report"])
    regroup(model, result)
    for sharing in tied_groups(module for module in model.modules() if isinstance(module, PackedModule)):
        tie(sharing)
    model.qpc_report = result  # type: ignore[assignment]
    register()
    return model.eval()


def regroup(model: nn.Module, plan: Report) -> None:
    """Make the members of each fused group row ranges of one packed weight again, and let readers of one value share their signs."""
    for members in {row.group for row in plan.rows if len(row.group) > 1}:
        linears = [module for module in map(model.get_submodule, members) if isinstance(module, QuantizedLinear)]
        if len(linears) != len(members):
            raise CheckpointError(f"the group of {members[0]} names linears that are not quantized; the checkpoint is damaged")
        devices = sorted({str(linear.scales.device) for linear in linears})
        if len(devices) > 1:
            raise CheckpointError(f"{', '.join(members)} are one weight, and cannot be on {' and '.join(devices)}; put them on one device")
        if len({(linear.in_features, linear.quantizer) for linear in linears}) == 1:  # a part of a model may hold other columns of each
            join(linears)
    share_signs(module for module in model.modules() if isinstance(module, PackedModule))


def _text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1, sort_keys=True) + "\n"


def _distinct(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under their first names, and the other names of tied ones. Signs are shared by many; they are tied where the codes are."""
    first: dict[tuple[object, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in state.items():
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        owner, _, leaf = name.rpartition(".")
        codes = aliases.get(f"{owner}.codes0")
        if leaf == "signs" and codes is not None:
            aliases[name] = codes.removesuffix("codes0") + leaf
        elif tensor.numel() and key in first and leaf != "signs":
            aliases[name] = first[key]
        else:
            first.setdefault(key, name)
            tensors[name] = tensor if leaf != "signs" else tensor.clone()
    return tensors, aliases


def _place(model: nn.Module, name: str, entry: object) -> None:
    try:
        replaced = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(
            f"the checkpoint quantizes {name}, which this model does not have; load it into the model it was made from"
        ) from None
    if not isinstance(entry, dict):
        raise CheckpointError(f"the entry of {name} is malformed; the checkpoint is damaged")
    out_features, in_features, block = (_count(name, entry, key) for key in ("out_features", "in_features", "block"))
    weight = getattr(replaced, "weight", None)
    found = tuple(weight.shape) if isinstance(weight, Tensor) else None
    if found not in ((out_features, in_features), (in_features, out_features)) or (block and in_features % block):
        raise CheckpointError(f"{name} is {out_features}x{in_features} (blocks of {block}) in the checkpoint, {found} in the model")
    bias = nn.Parameter(torch.empty(out_features, device="meta"), requires_grad=False) if entry.get("bias") else None
    model.set_submodule(name, QuantizedLinear(out_features, in_features, palette.from_json(entry.get("quantizer")), block, bias))


def _embedding_entry(module: QuantizedEmbedding) -> dict[str, Any]:
    return {
        "num_embeddings": module.num_embeddings,
        "embedding_dim": module.embedding_dim,
        "quantizer": palette.to_json(module.quantizer),
        "block": module.block,
        "dtype": str(module.scale.dtype).removeprefix("torch."),
        "scale": module.factor,
    }


def _place_embedding(model: nn.Module, name: str, entry: object) -> None:
    try:
        replaced = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(
            f"the checkpoint packs {name}, which this model does not have; load it into the model it was made from"
        ) from None
    if not isinstance(entry, dict):
        raise CheckpointError(f"the entry of {name} is malformed; the checkpoint is damaged")
    rows, features, block = (_count(name, entry, key) for key in ("num_embeddings", "embedding_dim", "block"))
    weight = getattr(replaced, "weight", None)
    found = tuple(weight.shape) if isinstance(weight, Tensor) else None
    if found != (rows, features) or (block and features % block):
        raise CheckpointError(f"{name} is {rows}x{features} (blocks of {block}) in the checkpoint, {found} in the model")
    dtype, scale = DTYPES.get(str(entry.get("dtype"))), entry.get("scale")
    if dtype is None or not isinstance(scale, float):
        raise CheckpointError(f"{name} has the dtype {entry.get('dtype')!r} and the scale {scale!r}; the checkpoint is damaged")
    model.set_submodule(name, QuantizedEmbedding(rows, features, palette.from_json(entry.get("quantizer")), block, dtype, scale))


def _place_gain(model: nn.Module, name: str, entry: object) -> None:
    try:
        norm = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(
            f"the checkpoint turns {name}, which this model does not have; load it into the model it was made from"
        ) from None
    weight = getattr(norm, "weight", None)
    if not isinstance(entry, dict) or not isinstance(weight, nn.Parameter) or weight.ndim != 1:
        raise CheckpointError(f"the entry of {name} does not fit a norm with a weight; the checkpoint is damaged")
    block, offset = _count(name, entry, "block"), entry.get("offset")
    if not block or weight.numel() % block or not isinstance(offset, float):
        raise CheckpointError(f"{name} has {weight.numel()} features, blocks of {block}, the offset {offset!r}; the checkpoint is damaged")
    signs = torch.empty(Rotation.bytes_for(weight.numel()), dtype=torch.uint8, device="meta")
    model.set_submodule(name, TurnedGain(norm, nn.Parameter(torch.empty_like(weight, device="meta")), offset, signs, block))


def _count(name: str, entry: dict[str, object], key: str) -> int:
    value = entry.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CheckpointError(f"{key} of {name} is {value!r}, it must be a count; the checkpoint is damaged")
    return value


def _check_sums(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], directory: str | os.PathLike[str]) -> None:
    """Manifest and tensors are what was saved."""
    expected = checksums_of(manifest, directory)
    if manifest.get("sha256") != manifest_checksum(manifest):
        raise CheckpointError(f"{Path(directory) / MANIFEST} was changed after it was saved; copy the checkpoint again")
    for name, checksum in expected.items():
        if name not in tensors or tensor_files.checksum(tensors[name]) != checksum:
            raise CheckpointError(f"{name} in {directory} is not what was saved; copy the checkpoint again")


def checksums_of(manifest: Mapping[str, Any], directory: str | os.PathLike[str]) -> dict[str, str]:
    """The checksum of each stored tensor by name. Raises `CheckpointError` for a checkpoint from before there were any."""
    found = manifest.get("checksums")
    if not isinstance(found, dict):
        raise CheckpointError(f"{Path(directory) / MANIFEST} has no checksums, so nothing tells whether it is whole; save the model again")
    return found


def _check_tensors(model: nn.Module, tensors: Mapping[str, Tensor], directory: str | os.PathLike[str]) -> None:
    """Every tensor that the model needs is there, with its shape, and with its dtype where it is packed."""
    needed = model.state_dict(keep_vars=True)
    for name, expected in needed.items():
        found = tensors.get(name)
        if found is None:
            raise CheckpointError(f"{directory} lacks the tensor {name}; the checkpoint is incomplete")
        if found.shape != expected.shape:
            raise CheckpointError(
                f"{name} has shape {tuple(found.shape)}, the model needs {tuple(expected.shape)}; the checkpoint is damaged"
            )
        packed = not expected.is_floating_point() or name.endswith(".scales")
        if found.dtype != expected.dtype and (packed or not found.is_floating_point()):
            raise CheckpointError(f"{name} is {found.dtype}, it must be {expected.dtype}; the checkpoint is damaged")
    unknown = sorted(tensors.keys() - needed.keys())
    if unknown:
        raise CheckpointError(
            f"{directory} holds a tensor {unknown[0]} that the model does not have; load it into the model it was made from"
        )


def _get(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    value = getattr(model.get_submodule(owner), leaf)
    assert isinstance(value, Tensor)
    return value


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)
