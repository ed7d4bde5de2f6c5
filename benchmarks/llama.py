"""Llama 3.1 8B with random weights: in bfloat16, or as packed random bits, which are the code of some weight; nothing is encoded."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.weights import random_weights
from qpc.inductor.hook import register
from qpc.kernels.linear import QuantizedLinear, join
from qpc.kernels.packed_module import PackedModule, share_signs
from qpc.quant.palette import trellis_at
from qpc.quant.quantizer import PackedWeight
from qpc.quant.rotation import Rotation

LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
"""The configuration that was published with its weights."""

TINY = LLAMA_8B | {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 512}
TINY |= {"num_hidden_layers": 2}
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
DEVIATION = 0.02
"""Of weights that are not packed."""


@dataclass(frozen=True)
class Kind:
    """A model to measure. bits, head_bits: of a weight of its layers, and of its output head; None: bfloat16."""

    bits: Fraction | None
    head_bits: Fraction | None = None


def build(kind: Kind, sizes: dict[str, Any], device: torch.device, shared: bool = False) -> nn.Module:
    """The model in evaluation mode. sizes: keys of its configuration.

    shared: let all bfloat16 matrices be the same memory: a model that says nothing, for compiling ahead in little memory.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # whose frequencies are numbers that count
    draw = torch.Generator().manual_seed(0)
    if kind.bits is not None:
        for layer in model.model.layers:
            for names in GROUPS:
                pack(layer, [name for name, _ in layer.named_modules() if name.endswith(names)], kind.bits, device, draw)
    if kind.head_bits is not None:
        pack(model, ["lm_head"], kind.head_bits, device, draw)
    share_signs(module for module in model.modules() if isinstance(module, PackedModule))
    memory = Memory(device, shared)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(memory.drawn(parameter.shape), requires_grad=False))
    register()
    return model.to(device)


def pack(owner: nn.Module, names: list[str], bits: Fraction, device: torch.device, draw: torch.Generator) -> None:
    """Put packed linears in the place of some that read one value, as row ranges of one weight."""
    linears: list[QuantizedLinear] = []
    rotation: Rotation | None = None
    for name in names:
        out_features, in_features = owner.get_submodule(name).weight.shape
        rotation = rotation or Rotation.random(in_features, draw).to(device)
        quantizer, seed = trellis_at(bits), int(torch.randint(1 << 30, (), generator=draw))
        weight = random_weights(quantizer, (out_features, in_features), 1, device, seed)[0]
        scales = weight.scales * in_features**-0.5
        packed = PackedWeight(out_features, in_features, quantizer, weight.codes, scales, rotation)
        linears.append(QuantizedLinear(out_features, in_features, quantizer, rotation.block).take(packed))
        owner.set_submodule(name, linears[-1])
    if len(linears) > 1:
        join(linears)


@dataclass
class Memory:
    """Where bfloat16 tensors come from: each a new one, or all the beginning of one."""

    device: torch.device
    shared: bool
    whole: Tensor | None = None

    def drawn(self, shape: torch.Size) -> Tensor:
        """Normal numbers of the usual deviation; a vector, which a norm has, is all ones."""
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16, device=self.device)
        if self.shared and self.whole is not None and self.whole.numel() >= shape.numel():
            return self.whole[: shape.numel()].view(shape)
        made = torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_(std=DEVIATION)
        self.whole = made.flatten() if self.shared else None
        return made


def linear_bytes(model: nn.Module) -> int:
    """Of the linears of all layers: codes, scales and signs, those that are shared once; or matrices."""
    linears = [module for name, module in model.named_modules() if name.endswith("_proj")]
    tensors = [tensor for linear in linears for tensor in (*linear.parameters(), *linear.buffers())]
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())
