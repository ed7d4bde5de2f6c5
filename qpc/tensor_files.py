"""The safetensors files of a checkpoint by their parts: which there are, what their headers say, and the checksums of what they hold.

A checkpoint has one file, or shards that an index beside them names, as transformers writes them.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qpc.errors import CheckpointError
from qpc.plain_files import parse_json, read_json, require_regular

TENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Of a checkpoint whose tensors are in several files: `weight_map` says in which."""

METADATA = {"format": "pt"}
"""Of every file, as transformers writes it."""

PIECE_BYTES = 16 << 20
"""As much of a tensor is in memory at once while a file is checked."""

DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""How safetensors calls the dtypes that a checkpoint may hold, in the order in which it puts them into a file."""

SHARD_BYTES = 5_000_000_000
"""Tensors of a checkpoint beyond this begin another file."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. start, stop: its bytes, counted from the beginning of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.stop - self.start

    def outline(self) -> Tensor:
        """A tensor of its shape and dtype without values. Raises `CheckpointError` for those that no checkpoint has."""
        try:
            return torch.empty(self.shape, dtype={name: dtype for dtype, name in DTYPES.items()}[self.dtype], device="meta")
        except (LookupError, RuntimeError, OverflowError):
            raise CheckpointError(f"{self.file} holds a {self.dtype} tensor of shape {self.shape}; the checkpoint is damaged") from None

    def pieces(self) -> Iterator[bytes]:
        """Its bytes in order, piece by piece. Raises `OSError` if the file ends before."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            left = self.nbytes
            while left:
                piece = file.read(min(left, PIECE_BYTES))
                if not piece:
                    raise OSError(f"ends {left} bytes early")
                left -= len(piece)
                yield piece

    def checksum(self) -> str:
        """As `checksum` of the tensor."""
        return digest(self.dtype, self.shape, self.pieces())


def digest(dtype: str, shape: Iterable[int], pieces: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of a tensor: of the line "BF16 [64, 128]", as safetensors calls its dtype, and of its bytes in little-endian order."""
    made = hashlib.sha256(f"{dtype} {list(shape)}\n".encode())
    for piece in pieces:
        made.update(piece)
    return made.hexdigest()


def checksum(tensor: Tensor) -> str:
    """The `digest` of a tensor on any device."""
    return digest(DTYPES[tensor.dtype], tensor.shape, [raw(tensor)])


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as a file has them; shares its memory if it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def shards(tensors: Mapping[str, Tensor], most_bytes: int = SHARD_BYTES) -> dict[str, dict[str, Tensor]]:
    """The files of a checkpoint, and which tensors go into each: in their order, as many as there is room for, one at least."""
    cut: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if cut[-1] and filled + tensor.nbytes > most_bytes:
            cut.append({})
            filled = 0
        cut[-1][name] = tensor
        filled += tensor.nbytes
    if len(cut) == 1:
        return {TENSORS: cut[0]}
    stem, suffix = TENSORS.split(".")
    return {f"{stem}-{number:05d}-of-{len(cut):05d}.{suffix}": shard for number, shard in enumerate(cut, start=1)}


def write_index(directory: Path, cut: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write the index beside several shards; a single file needs none."""
    if len(cut) > 1:
        total = sum(tensor.nbytes for shard in cut.values() for tensor in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": {name: file for file, shard in cut.items() for name in shard}}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def outline(path: Path, tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, Stored]]:
    """The header of a file of these tensors, whatever their values and device, as safetensors writes it; and where each belongs."""
    order = {dtype: rank for rank, dtype in enumerate(DTYPES)}
    entries: dict[str, Any] = {"__metadata__": METADATA}
    stop = 0
    for name in sorted(tensors, key=lambda name: (order[tensors[name].dtype], name)):
        tensor = tensors[name]
        start, stop = stop, stop + tensor.nbytes
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    del entries["__metadata__"]
    base = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: _stored(path, base, entry) for name, entry in entries.items()}


def files(directory: str | os.PathLike[str]) -> dict[Path, set[str]]:
    """The files of a checkpoint, each with the tensors that the index wants from it; none are named if there is no index."""
    directory = Path(directory)
    if (directory / TENSORS).is_file() or not (directory / INDEX).is_file():
        return {directory / TENSORS: set()}
    wanted: dict[Path, set[str]] = {}
    for name, shard in sorted(read_index(directory / INDEX).items()):
        wanted.setdefault(directory / shard, set()).add(name)
    return dict(sorted(wanted.items()))


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor. Raises `CheckpointError` if that is not what the index says."""
    try:
        index = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; the checkpoint is damaged") from error
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not all(isinstance(shard, str) and Path(shard).name == shard for shard in found.values()):
        raise CheckpointError(f"{path} has no valid weight_map from tensors to files beside it; the checkpoint is damaged")
    return found


def headers(directory: str | os.PathLike[str]) -> dict[str, Stored]:
    """Every tensor of a checkpoint by name, without its values. Raises `CheckpointError` for files that are missing or damaged."""
    found: dict[str, Stored] = {}
    for path, wanted in files(directory).items():
        here = header(path)
        _check_complete(path, wanted, here)
        found |= here
    return found


def header(path: Path) -> dict[str, Stored]:
    """The tensors of one file. Raises `CheckpointError` if it is missing, cut short or damaged."""
    try:
        require_regular(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if length + 8 > size:
                raise ValueError(f"its header should have {length} bytes")
            entries = parse_json(file.read(length))
        found = {name: _stored(path, 8 + length, entry) for name, entry in entries.items() if name != "__metadata__"}
        end = max((each.stop for each in found.values()), default=8 + length)
        if end != size:
            raise ValueError(f"it has {size} bytes and should have {end}")
        return found
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, MemoryError, OverflowError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; the checkpoint is cut short or damaged") from error


def read(directory: str | os.PathLike[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Every tensor of a checkpoint by name. Raises `CheckpointError` for files that are missing or damaged."""
    found: dict[str, Tensor] = {}
    for path, wanted in files(directory).items():
        here = _read_file(path, device)
        _check_complete(path, wanted, here)
        found |= here
    return found


def read_parts(
    directory: str | os.PathLike[str], places: Mapping[str, tuple[slice, ...]], device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """A part of each of some tensors of a checkpoint, by name; nothing else is read.

    places: where the part lies, a slice for each of the first axes; an empty place is the whole tensor.
    Raises `CheckpointError` for files that are missing or damaged, and for a tensor that is in none of them.
    """
    found: dict[str, Tensor] = {}
    for path in files(directory):
        found |= _read_file(path, device, places)
    _check_complete(Path(directory), places, found)
    return found


def _read_file(path: Path, device: torch.device | str, places: Mapping[str, tuple[slice, ...]] | None = None) -> dict[str, Tensor]:
    """The tensors of a file, or of those that have a place what lies there."""
    try:
        require_regular(path)
        with safe_open(path, framework="pt", device=str(device)) as file:
            names = file.keys()
            if places is None:
                return {name: file.get_tensor(name) for name in names}
            return {name: _part(file, name, places[name]) for name in names if name in places}
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; the checkpoint is cut short or damaged") from error


def _part(file: Any, name: str, place: tuple[slice, ...]) -> Tensor:
    """A tensor of its own: what safetensors gives is a view of the whole one."""
    part: Tensor = file.get_slice(name)[place] if place else file.get_tensor(name)
    return part.clone(memory_format=torch.contiguous_format) if place else part


def _check_complete(path: Path, wanted: Iterable[str], found: Mapping[str, object]) -> None:
    for name in wanted:
        if name not in found:
            raise CheckpointError(f"{path} lacks the tensor {name}; the checkpoint is incomplete")


def _stored(path: Path, base: int, entry: Mapping[str, Any]) -> Stored:
    start, stop = entry["data_offsets"]
    return Stored(path, str(entry["dtype"]), tuple(map(int, entry["shape"])), base + int(start), base + int(stop))
