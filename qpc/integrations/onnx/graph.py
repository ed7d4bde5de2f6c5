"""From a traced program to an ONNX file: translated by PyTorch's exporter, every tensor once, the functions of qpc beside the graph."""

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnx_ir.tensor_adapters import TorchTensor

import qpc
from qpc.errors import ModelError, UsageError
from qpc.integrations.onnx import data_of, functions
from qpc.integrations.onnx.decoder import Traced, first_line, quiet
from qpc.integrations.onnx.translation import TRANSLATIONS

EXTERNAL_BYTES = 1_900_000_000
"""Tensors of more bytes go into a second file: a protobuf message ends at 2^31."""

SMALL = 1 << 20
"""Elements of tensors that are compared by content: tables, Hadamard matrices, signs."""

HALVES = (torch.float16, torch.bfloat16)


def build(traced: Traced, stored: Mapping[str, torch.dtype]) -> ir.Model:
    """The ONNX model of a program.

    stored: dtypes of the model's tensors by name; those of 16 bits are stored so, and cast when they are read.
    Raises `ModelError` for an operator that has no translation.
    """
    check_operators(traced)
    try:
        with quiet():
            exported = torch.onnx.export(
                traced.program,
                dynamo=True,
                opset_version=functions.OPSET,
                input_names=list(traced.inputs),
                output_names=list(traced.outputs),
                custom_translation_table=TRANSLATIONS,
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        raise ModelError(f"the model cannot be translated to ONNX: {first_line(error)}") from error
    assert exported is not None
    model = exported.model
    name_sizes(model.graph)
    share_tied(model.graph)
    narrow(model.graph, {name: dtype for name, dtype in stored.items() if dtype in HALVES})
    passes = ir.passes.Sequential(
        common.ClearMetadataAndDocStringPass(),
        common.LiftConstantsToInitializersPass(size_limit=16),
        common.DeduplicateInitializersPass(size_limit=SMALL),
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
    )
    model = passes(model).model
    attach_functions(model)
    model.producer_name, model.producer_version = "qpc", qpc.__version__
    return model


def write(model: ir.Model, path: Path) -> tuple[Path, ...]:
    """Write a model, and return its files, the model first. Raises `UsageError` if it cannot be written; then nothing is left of it."""
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    data = data_of(path)
    external = data.name if sum(tensor.nbytes for tensor in tensors) > EXTERNAL_BYTES else None
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.partial-", dir=path.parent) as partial:
            ir.save(model, Path(partial) / path.name, external_data=external)
            if external is not None:
                os.replace(Path(partial) / external, data)
            os.replace(Path(partial) / path.name, path)
            if external is None:
                data.unlink(missing_ok=True)  # of the model that was replaced
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
    return (path,) if external is None else (path, data)


def check_operators(traced: Traced) -> None:
    """Raise `ModelError`, naming the first operator of qpc that has no translation."""
    for node in traced.program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "qpc" and node.target not in TRANSLATIONS:
            known = ", ".join(sorted(str(target) for target in TRANSLATIONS))
            raise ModelError(f"{node.target} (node {node.name}) cannot be exported to ONNX; these can: {known}")


def name_sizes(graph: ir.Graph) -> None:
    """Call the free sizes `batch`, `length` and `past` wherever they occur, in the place of the symbols of the trace."""
    ids, mask, *past = graph.inputs
    names = {_symbol(ids, 0): "batch", _symbol(ids, 1): "length"} | {_symbol(value, 2): "past" for value in past}
    names |= {_symbol(mask, 1): "past + length"} if past else {}
    symbols = re.compile(rf"\b({'|'.join(names)})\b")
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            sizes = (size if isinstance(size, int) else size.value for size in value.shape)
            value.shape = ir.Shape(symbols.sub(lambda found: names[found[0]], size) if isinstance(size, str) else size for size in sizes)


def _symbol(value: ir.Value, axis: int) -> str:
    assert value.shape is not None
    return str(value.shape[axis])


def share_tied(graph: ir.Graph) -> None:
    """Let all readers of one stored tensor read it by one name."""
    first: dict[tuple[object, ...], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = getattr(value.const_value, "raw", None)
        if not isinstance(tensor, torch.Tensor) or not tensor.numel():
            continue
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if key not in first:
            first[key] = value
        else:
            ir.convenience.replace_all_uses_with(value, first[key])
            del graph.initializers[name]


def narrow(graph: ir.Graph, stored: Mapping[str, torch.dtype]) -> None:
    """Store these float32 tensors in the 16 bits that they came in, which hold their values, and cast them where they are read."""
    for name, value in list(graph.initializers.items()):
        dtype = stored.get(Traced.name_in_model(name))
        tensor = getattr(value.const_value, "raw", None)
        if dtype is None or not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float32:
            continue
        del graph.initializers[name]
        short = TorchTensor(tensor.to(dtype), name=name)
        source = ir.Value(name=name, shape=value.shape, type=ir.TensorType(short.dtype), const_value=short)
        cast = ir.node("Cast", [source], {"to": ir.DataType.FLOAT}, outputs=[ir.Value(name=f"{name}.float", shape=value.shape)])
        cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        graph.register_initializer(source)
        graph.insert_before(graph[0], cast)


def attach_functions(model: ir.Model) -> None:
    """Put the functions that the graph calls, and before them those that they call, into the model."""
    for name in sorted({node.op_type for node in model.graph if node.domain == functions.DOMAIN}):
        function = getattr(functions, name)
        for each in reversed([function, *function.function_ir.get_called_functions().values()]):
            found = ir.serde.deserialize_function(each.to_function_proto())
            model.functions[found.identifier()] = found
    model.graph.opset_imports[functions.DOMAIN] = functions.VERSION
