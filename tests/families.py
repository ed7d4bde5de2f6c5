"""Tiny random models of every family that qpc must take, and plain modules with awkward linears.

`FAMILIES` are causal language models; `PLAIN` are modules that need example inputs, which `plain_inputs` makes. All are seeded and in
evaluation mode.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import transformers
from torch import Tensor, fx, nn

from qpc.capture import capture
from qpc.ir.program import Program
from qpc.passes.canonicalize import Canonicalize
from qpc.passes.fusion import Fusion
from qpc.passes.pipeline import Pipeline

VOCABULARY = 96
WIDTH = 64


def causal_lm(architecture: str, **options: Any) -> nn.Module:
    """A seeded causal language model of two layers; `options` change its configuration."""
    config_class = getattr(transformers, f"{architecture}Config" if not architecture.startswith("Gemma3") else "Gemma3TextConfig")
    model_class = getattr(transformers, "GPT2LMHeadModel" if architecture == "GPT2" else f"{architecture}ForCausalLM")
    common = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = model_class(config_class(**(common | options))).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_(std=0.1)
    assert isinstance(model, nn.Module)
    return model


def decoder(architecture: str, **options: Any) -> nn.Module:
    """A model with the usual configuration keys of a grouped-query decoder."""
    usual = {
        "hidden_size": WIDTH,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    return causal_lm(architecture, **(usual | options))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": partial(decoder, "Llama"),
    "llama_odd": partial(decoder, "Llama", hidden_size=60, intermediate_size=100, head_dim=20),
    "llama_tied": partial(decoder, "Llama", tie_word_embeddings=True),
    "qwen2": partial(decoder, "Qwen2"),
    "qwen3": partial(decoder, "Qwen3"),
    "mistral": partial(decoder, "Mistral", sliding_window=8),
    "gemma2": partial(decoder, "Gemma2", sliding_window=8, query_pre_attn_scalar=16),
    "gemma3": partial(decoder, "Gemma3", sliding_window=8, query_pre_attn_scalar=16, layer_types=["sliding_attention", "full_attention"]),
    "phi3": partial(decoder, "Phi3"),
    "olmo2": partial(decoder, "Olmo2"),
    "gpt2": partial(causal_lm, "GPT2", n_embd=WIDTH, n_layer=2, n_head=4, n_positions=128),
}


class Siblings(nn.Module):
    """Three linears that read `x`; the bias of `last` is computed from the result of `left`."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(32, 64)
        self.right = nn.Linear(32, 48, bias=False)
        self.last = nn.Linear(32, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        last = nn.functional.linear(x, self.last.weight, left.mean(dim=(0, 1)))
        return torch.cat([left, self.right(x), last], dim=-1)


class Twice(nn.Module):
    """One linear that is applied twice in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.step(torch.tanh(self.step(x)))
        return result


class Shared(nn.Module):
    """Two linears with one weight between them, and biases of their own; both read `x`."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(32, 32)
        self.b = nn.Linear(32, 32)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], dim=-1)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """The module, built from seed 0 and in evaluation mode."""
    torch.manual_seed(0)
    return build().eval()


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: seeded(lambda: nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 20))),
    "siblings": lambda: seeded(Siblings),
    "twice": lambda: seeded(Twice),
    "shared": lambda: seeded(Shared),
}


def plain_inputs(batch: int = 3, length: int = 5) -> tuple[Tensor, ...]:
    """Inputs of any module of `PLAIN`: float32 [batch, length, 32]."""
    return (torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(1)),)


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    """Random token ids, int64 [batch, length]."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


@cache
def model(name: str) -> nn.Module:
    """The model or module of this name, built once; tests must not change it."""
    return (FAMILIES | PLAIN)[name]()


def inputs(name: str, batch: int, length: int) -> tuple[Tensor, ...]:
    """Inputs of the model or module of this name."""
    return (tokens(batch, length),) if name in FAMILIES else plain_inputs(batch, length)


@cache
def _captured(name: str) -> Program:
    return capture(model(name), example_inputs=None if name in FAMILIES else plain_inputs())


def captured(name: str) -> Program:
    """A fresh copy of the captured program of this name; capturing itself is done once."""
    return copied(_captured(name))


@cache
def _grouped(name: str) -> Program:
    program = captured(name)
    Pipeline((Canonicalize(), Fusion())).run(program)
    return program


def grouped(name: str) -> Program:
    """A fresh copy of the program of this name after fusion analysis."""
    return copied(_grouped(name))


def copied(program: Program) -> Program:
    """A program on the same module whose graph and books may be changed."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    results = graph.graph_copy(program.graph, values)
    graph.output(results)
    for old, new in values.items():
        new.name = old.name
    return replace(
        program,
        graph_module=fx.GraphModule(program.graph_module, graph),
        tensors=dict(program.tensors),
        excluded=dict(program.excluded),
        tuned=dict(program.tuned),
        remarks=list(program.remarks),
        rotated=set(program.rotated),
        packed=dict(program.packed),
        tables=dict(program.tables),
        decisions=dict(program.decisions),
        history=list(program.history),
    )
