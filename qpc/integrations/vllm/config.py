"""What vLLM asks a quantization method: which layers it quantizes, and how."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from qpc.errors import CheckpointError
from qpc.integrations.transformers import METHOD, fetched_home
from qpc.integrations.vllm.embedding import PackedTableMethod
from qpc.integrations.vllm.linear import PackedLinearMethod
from qpc.integrations.vllm.stored import StoredWeight, linears_of, members, table_of, tables_of
from qpc.kernels.select import MIN_CAPABILITY, TRITON_DTYPES


class QPaletteQuantizationConfig(QuantizationConfig):  # type: ignore[misc]
    """The packed linears and embeddings of a checkpoint, by their names in the model of vLLM. All others stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.linears: dict[str, StoredWeight] = {}
        self.tables: dict[str, StoredWeight] = {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QPaletteQuantizationConfig":
        """From the `quantization_config` of config.json. Raises `CheckpointError` for facts that this version does not read."""
        from qpc.integrations.hf_config import QPaletteConfig

        if QPaletteConfig(**config).format_version is None:
            raise CheckpointError("config.json asks for a model to be compiled, vLLM serves compiled ones; run `qpc compile` first")
        return cls()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the manifest of the checkpoint. Raises `CheckpointError` if it cannot be served."""
        from qpc.checkpoint import read_manifest

        manifest = read_manifest(model_name if Path(model_name).is_dir() else fetched_home(model_name, revision))
        self.linears, self.tables = linears_of(manifest), tables_of(manifest)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take the names that vLLM gives to modules."""
        self.linears = hf_to_vllm_mapper.apply_dict(self.linears)
        self.tables = hf_to_vllm_mapper.apply_dict(self.tables)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How to hold and apply the weight of a layer; None for what is neither a linear nor a packed table.

        Raises `CheckpointError` if the members of a fused layer cannot be one weight.
        """
        if isinstance(layer, VocabParallelEmbedding):
            table = self.linears.get(prefix) or table_of(prefix, layer.org_vocab_size, self.tables)
            return PackedTableMethod(table) if table else None
        if not isinstance(layer, LinearBase):
            return None
        found = members(prefix, self.linears, self.packed_modules_mapping)
        return PackedLinearMethod(prefix, found) if found else UnquantizedLinearMethod()

    def get_name(self) -> Any:
        """The name of the method."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes that the kernels take."""
        return list(TRITON_DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest GPU that the kernels run on, as vLLM counts."""
        major, minor = MIN_CAPABILITY
        return 10 * major + minor

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: config.json names the method, and what else it needs is read in `maybe_update_config`."""
        return []
