"""Compiled language models as ONNX files that stock ONNX Runtime runs: codes stay packed, and standard operators decode them.

`functions` holds what decodes, `translation` what becomes of the operators, `decoder` the inputs and outputs, `graph` the file.
"""

import importlib.util
import os
from pathlib import Path

from qpc import checkpoint
from qpc.errors import UsageError
from qpc.integrations.storage import load

PACKAGES = ("onnx", "onnxscript")


def export(
    directory: str | os.PathLike[str], path: str | os.PathLike[str], *, cache: bool = True, overwrite: bool = False
) -> tuple[Path, ...]:
    """Write the compiled model in `directory` to an ONNX file, and return the files that were written.

    Inputs: `input_ids` int64 [batch, length] and `attention_mask` int64 [batch, past + length], 0 where a token is padding (on the left);
        with `cache` also `past_key_values.N.key` and `.value` of each layer N, float32 [batch, heads, past, head_dim]; past may be 0.
    Outputs: `logits` float32 [batch, length, vocabulary]; with `cache` also `present.N.key` and `.value`, [batch, heads, past + length,
        head_dim], which are the next call's past.
    Everything is computed in float32; tensors that the checkpoint holds in 16 bits stay so in the file. Above 2 GB tensors go into a
    second file, `path` with `.data` behind its name.

    Raises `UsageError` if a package is missing or the place is taken, `CheckpointError` for what is not a checkpoint, and `ModelError` for
    a model that cannot be exported.
    """
    path = Path(path)
    check_packages()
    check_place(path, overwrite)
    checkpoint.read_manifest(directory)
    from qpc.integrations.onnx.decoder import trace
    from qpc.integrations.onnx.graph import build, write

    model = load(directory)
    stored = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    traced = trace(model.float(), cache)
    return write(build(traced, stored), path)


def data_of(path: Path) -> Path:
    """The second file of a large model."""
    return path.with_name(f"{path.name}.data")


def check_packages() -> None:
    """Raise `UsageError` unless the packages that write ONNX are installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"exporting to ONNX needs {' and '.join(missing)}: pip install 'qpc[onnx]'")


def check_place(path: Path, overwrite: bool = False) -> None:
    """Raise `UsageError` unless a file may be written at `path`."""
    if path.is_dir():
        raise UsageError(f"{path} is a directory; name a file such as {path / 'model.onnx'}")
    taken = [file for file in (path, data_of(path)) if file.exists()]
    if taken and not overwrite:
        raise UsageError(f"{taken[0]} exists; choose another file or allow overwriting")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"cannot write to {path}: {path.parent} is not a writable directory")
