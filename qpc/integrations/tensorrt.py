"""TensorRT for all of a compiled model but its packed weights, through the backend of `torch.compile` that torch_tensorrt brings.

The operators of qpc stay islands of PyTorch between engines. Written after the documentation of torch_tensorrt's `CompilationSettings`
(`torch_executed_ops`, `use_explicit_typing`, as of 2.14); it has not been run on a machine with TensorRT.
"""

from dataclasses import fields, is_dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from qpc.errors import SettingsError

BACKEND = "torch_tensorrt"


class Runtime(StrEnum):
    """What runs the operators of a model that are not of qpc."""

    PYTORCH = "pytorch"
    TENSORRT = "tensorrt"

    @staticmethod
    def parse(text: "Runtime | str") -> "Runtime":
        """The runtime of this name. Raises `SettingsError` that lists the legal names."""
        if text not in list(Runtime):
            raise SettingsError(f"unknown runtime {text!r}; known: {', '.join(Runtime)}")
        return Runtime(text)


def attach(model: nn.Module) -> nn.Module:
    """Let calls of a model compile it for TensorRT, engine by engine, when they first see a shape. Returns the model.

    Raises `SettingsError` if torch_tensorrt cannot be imported or lacks a setting, or the model is not on a GPU.
    """
    settings: dict[str, Any] = {"torch_executed_ops": operators(), "use_explicit_typing": True}
    check_settings(settings)
    places = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    if places != {"cuda"}:
        raise SettingsError(
            f"runtime='tensorrt' needs a model on a GPU, this one is on {', '.join(sorted(places))}; load it with device='cuda'"
        )
    model.compile(backend=BACKEND, options=settings)
    return model


def operators() -> set[torch._ops.OpOverload]:
    """The operators of qpc."""
    from qpc.kernels import attention_ops, embedding, linear  # noqa: F401 - importing them registers torch.ops.qpc

    names = {name.partition("::")[2].partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("qpc::")}
    return {getattr(torch.ops.qpc, name).default for name in names}


def check_settings(settings: dict[str, Any]) -> None:
    """Raise `SettingsError` unless torch_tensorrt can be imported and knows these settings."""
    try:
        found = version("torch_tensorrt")
        from torch_tensorrt.dynamo import CompilationSettings
    except (PackageNotFoundError, ImportError, OSError) as error:
        raise SettingsError(f"runtime='tensorrt' needs torch_tensorrt ({error}): pip install 'qpc[tensorrt]'") from error
    known = {field.name for field in fields(CompilationSettings)} if is_dataclass(CompilationSettings) else set()
    missing = sorted(settings.keys() - known)
    if missing:
        raise SettingsError(f"torch_tensorrt {found} does not know {', '.join(missing)}; required 2.14, whose documentation names them")
