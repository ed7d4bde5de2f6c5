"""ONNX Runtime as the tests use it."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from qpc.integrations.onnx import functions


def session(model: bytes | Path, packed: bool = False) -> onnxruntime.InferenceSession:
    """A session on the CPU. packed: without constant folding, so that every run decodes the codes."""
    source = model if isinstance(model, bytes) else str(model)
    disabled = ["ConstantFolding"] if packed else []
    return onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)


def call(function: Any, rank: int, *inputs: NDArray[Any], **attributes: Any) -> NDArray[Any]:
    """The float32 result of one function of the domain, of this rank, once the checker is content."""
    names = [f"input{index}" for index in range(len(inputs))]
    types = [helper.np_dtype_to_tensor_dtype(value.dtype) for value in inputs]
    given = [helper.make_tensor_value_info(*each, value.shape) for *each, value in zip(names, types, inputs, strict=True)]
    result = helper.make_tensor_value_info("result", TensorProto.FLOAT, [f"size{axis}" for axis in range(rank)])
    node = helper.make_node(function.name, names, ["result"], domain=functions.DOMAIN, **attributes)
    called = [function, *function.function_ir.get_called_functions().values()]
    model = helper.make_model(
        helper.make_graph([node], "call", given, [result]),
        functions=[each.to_function_proto() for each in called],
        opset_imports=[helper.make_opsetid("", functions.OPSET), helper.make_opsetid(functions.DOMAIN, functions.VERSION)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return run(session(model.SerializeToString()), dict(zip(names, inputs, strict=True)))[0]


def run(running: onnxruntime.InferenceSession, inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """All results of a session."""
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(value.view(np.uint16), TensorProto.BFLOAT16)
        if value.dtype.name == "bfloat16"
        else onnxruntime.OrtValue.ortvalue_from_numpy(value)
        for name, value in inputs.items()
    }
    return [value.numpy() for value in running.run_with_ort_values(None, values)]


def initializers(path: Path) -> dict[str, ir.TensorProtocol]:
    """The stored tensors of a model by name."""
    values = ir.load(path).graph.initializers.values()
    return {value.name: value.const_value for value in values if value.name and value.const_value is not None}
