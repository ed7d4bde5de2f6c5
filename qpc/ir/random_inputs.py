"""Inputs for a program when there is no data."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from qpc.errors import ModelError
from qpc.ir.annotation import fake_value
from qpc.ir.program import Program


def random_inputs(program: Program, *, batch: int, length: int, seed: int, device: torch.device | str | None = None) -> tuple[Tensor, ...]:
    """Inputs of the program, drawn with `seed`.

    An integer input that an embedding looks up is drawn uniformly from its rows, other integers are ones, and floating-point inputs
    are standard normal. batch, length: sizes of a symbolic first axis and of other symbolic axes; length never exceeds what the model's
    configuration allows. If all inputs are floating-point matrices, their rows are the positions, batch * length of them.
    device: by default that of the model.

    Raises `ModelError` for an input that is not a tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    device = program.device if device is None else device
    config = getattr(program.module, "config", None)
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    sizes: dict[Any, int] = {}
    found = []
    placeholders = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    fakes: dict[str, Tensor] = {}
    for name in program.inputs:
        fake = fake_value(placeholders[name])
        if not isinstance(fake, Tensor):
            raise ModelError(f"the input {name} is not a tensor, so it cannot be drawn at random; give the inputs")
        fakes[name] = fake
    if all(fake.is_floating_point() and fake.ndim == 2 for fake in fakes.values()):
        batch *= length
    for name, fake in fakes.items():
        shape = [_size(size, batch if axis == 0 else length, sizes) for axis, size in enumerate(fake.shape)]
        rows = vocabulary(program, placeholders[name])
        if fake.is_floating_point():
            value = torch.randn(shape, generator=generator).to(fake.dtype)
        elif rows is not None:
            value = torch.randint(rows, shape, generator=generator).to(fake.dtype)
        else:
            value = torch.ones(shape, dtype=fake.dtype)
        found.append(value.to(device))
    return tuple(found)


def _size(size: int | torch.SymInt, default: int, known: dict[Any, int]) -> int:
    """A size with every unknown symbol in it set to the default."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    for symbol in sorted(expression.free_symbols, key=str):
        known.setdefault(symbol, default)
    return int(expression.subs(known))


def vocabulary(program: Program, tokens: fx.Node) -> int | None:
    """Rows of the nearest embedding that looks up this input, or an integer tensor made of it."""
    seen, queue = {tokens}, [tokens]
    for node in queue:
        for user in node.users:
            if "embedding" in str(user.target) or (user.op == "call_module" and _is_embedding(program, user)):
                tables = [program.tensors[n.name] for n in user.all_input_nodes if n.name in program.tensors]
                if user.op == "call_module":
                    tables = [f"{user.target}.weight"]
                return len(program.tensor(tables[0])) if tables else None
            value = fake_value(user)
            if user not in seen and isinstance(value, Tensor) and not value.is_floating_point():
                seen.add(user)
                queue.append(user)
    return None


def _is_embedding(program: Program, node: fx.Node) -> bool:
    return isinstance(program.graph_module.get_submodule(str(node.target)), nn.Embedding)
