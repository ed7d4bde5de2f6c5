"""The quantization method `qpalette` of transformers: `from_pretrained` reads what qpc compiled, or compiles what it has read.

Importing this module registers the method. What only a model needs is imported later: transformers may be in the middle of its own import.
"""

import os
import re
from inspect import signature
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from qpc.errors import ModelError, SettingsError
from qpc.integrations.hf_config import QPaletteConfig
from qpc.integrations.transformers import METHOD, fetched_home

register_quantization_config(METHOD)(QPaletteConfig)


@register_quantizer(METHOD)
class QPaletteHfQuantizer(HfQuantizer):
    """Puts packed modules into the skeleton of a model before its tensors are read, and settles them afterwards.

    transformers reads the tensors, onto the devices of its device map. Without a checkpoint of qpc it reads the original, which is compiled
    in the end.
    """

    quantization_config: QPaletteConfig
    modules_to_not_convert: tuple[str, ...] = ()
    """Asked for by transformers 4."""

    def __init__(self, quantization_config: QPaletteConfig, **kwargs: Any) -> None:
        """quantization_config: of a checkpoint, or a request."""
        super().__init__(quantization_config, **kwargs)
        self.saving_to: Path | None = None
        self._manifest: dict[str, Any] = {}
        self._scales: dict[str, Tensor] = {}

    def validate_environment(self, *args: Any, device_map: object = None, **kwargs: Any) -> None:
        """Raise `ModelError` for a device map that cannot be followed, `SettingsError` for a request without a budget."""
        if not self.pre_quantized and self.quantization_config.budget is None:
            raise SettingsError("there is no budget to compile the model to; say QPaletteConfig(budget=3.25)")
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ModelError(
                f"packed weights are not offloaded, the device map has {', '.join(sorted(places))}; give devices that hold all"
            )
        if not self.pre_quantized and len(places) > 1:
            raise ModelError(f"a model is compiled on one device, the device map has {', '.join(sorted(places))}; name one")

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any) -> None:
        from qpc import checkpoint

        if not self.pre_quantized:
            return
        directory = home(model, checkpoint_files)
        self._manifest = checkpoint.read_manifest(directory)
        checkpoint.place(model, self._manifest)
        with torch.device("cpu"):  # transformers 5 makes its models inside of torch.device("meta")
            tensors = checkpoint.read_tensors(model, self._manifest, directory)
        self._scales = {name: tensor for name, tensor in tensors.items() if name.endswith(".scales")}
        shared = [f"^{re.escape(name)}$" for name in self._manifest["aliases"]]
        model._keys_to_ignore_on_load_missing = [*(model._keys_to_ignore_on_load_missing or ()), *shared]
        forget_packed_ties(model)
        for module in packed_modules(model).values():  # GPT-2 initializes the weights of linears by their place, also where all is read
            module.weight = torch.empty(0, device="cpu")

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from qpc import checkpoint
        from qpc.compiler import compile

        if (getattr(model, "_tp_size", None) or 1) > 1:
            raise ModelError("transformers cannot split packed weights; use qpc.load(directory, tp=…) for tensor parallelism")
        if self.pre_quantized:
            for module in packed_modules(model).values():
                vars(module).pop("weight", None)
            restore(model, self._scales)
            checkpoint.settle(model, self._manifest)
            self._manifest, self._scales = {}, {}
        else:
            compiled = compile(model, self.quantization_config.budget, **self.quantization_config.options)
            for name, child in compiled.named_children():
                model.add_module(name, child)
            model.qpc_report = compiled.qpc_report
        adopt(model)

    def get_state_dict_and_metadata(self, model: Any, safe_serialization: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors of the checkpoint; writes its manifest beside them. Raises `ModelError` outside of `model.save_pretrained`."""
        from qpc import checkpoint

        if self.saving_to is None or not safe_serialization:
            raise ModelError("a compiled model is saved as safetensors, by its own save_pretrained, or by qpc.save")
        checkpoint.write_manifest(model, self.saving_to)
        return checkpoint.stored(model), {}

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Always."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Never: the operators have no gradients."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The operators are known to `torch.compile`."""
        return True


def home(model: Any, checkpoint_files: list[str] | None) -> Path:
    """The directory of the checkpoint: a local one, or where transformers keeps what it fetched.

    Raises `CheckpointError` if there is no manifest.
    """
    from qpc.checkpoint import MANIFEST

    name = model.config.name_or_path
    beside = Path(checkpoint_files[0]).parent if checkpoint_files else Path(name)
    if beside.is_dir() and ((beside / MANIFEST).is_file() or Path(name).is_dir()):
        return beside
    return fetched_home(name, getattr(model.config, "_commit_hash", None))


def forget_packed_ties(model: Any) -> None:
    """Keep transformers from tying the `weight` of embeddings and heads that have none; what is packed is tied by `PackedModule`."""
    from qpc.kernels.packed_module import PackedModule

    def packed(name: str) -> bool:
        return isinstance(model.get_submodule(name.rpartition(".")[0]), PackedModule)

    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for target in [target for target, source in ties.items() if packed(target) or packed(source)]:
        del ties[target]
    if isinstance(model.get_input_embeddings(), PackedModule):
        model.tie_weights = MethodType(keep_ties, model)


def keep_ties(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """In place of `tie_weights`: packed modules stay tied by themselves."""


def restore(model: Any, scales: dict[str, Tensor]) -> None:
    """Undo what transformers did to packed modules: version 4 casts scales, version 5 forgets buffers that no checkpoint holds."""
    from qpc.kernels.embedding import QuantizedEmbedding

    for name, module in packed_modules(model).items():
        device = module.scales.device
        if module.scales.dtype != torch.bfloat16:
            module.scales = scales[f"{name}.scales"].to(device)
        if isinstance(module, QuantizedEmbedding):
            module.scale = torch.tensor(module.factor, dtype=model.dtype, device=device)


def packed_modules(model: nn.Module) -> dict[str, Any]:
    """The packed modules of a model by name, under all their names."""
    from qpc.kernels.packed_module import PackedModule

    return {name: module for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, PackedModule)}


def adopt(model: nn.Module) -> nn.Module:
    """Let a compiled model of transformers be saved by its own `save_pretrained` and `push_to_hub`. Returns the model."""
    from qpc.compiler import report_of

    adopted: Any = model
    config = QPaletteConfig.of(report_of(model))
    adopted.config.quantization_config = config
    adopted.hf_quantizer = QPaletteHfQuantizer(config, pre_quantized=True)
    adopted.quantization_method = METHOD
    adopted.save_pretrained = MethodType(save_pretrained, model)
    forget_packed_ties(model)
    return model


def save_pretrained(model: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """What `save_pretrained` of the model's class does, with the manifest beside the tensors, and these under the names that it has."""
    from qpc.checkpoint import check_whole

    check_whole(model)
    save = type(model).save_pretrained
    if "save_original_format" in signature(save).parameters:
        kwargs.setdefault("save_original_format", False)
    quantizer: QPaletteHfQuantizer = model.hf_quantizer
    quantizer.saving_to = Path(save_directory)
    try:
        save(model, save_directory, *args, **kwargs)
    finally:
        quantizer.saving_to = None
