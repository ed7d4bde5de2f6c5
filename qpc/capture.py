"""From an `nn.Module` to one graph, by `torch.export` on fake tensors: no data runs through the model and nothing of it is copied."""

import inspect
import logging
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind

from qpc.errors import CaptureError, ModelError
from qpc.ir.functional import make_functional
from qpc.ir.inline import inline_regions
from qpc.ir.program import Program, named_tensors
from qpc.ir.unreached import unreached
from qpc.ir.values import mutated, remove_dead_code
from qpc.kernels.experts import routes_experts

OUTPUT_HEAD = "the output head stays as it is"
EMBEDDING = "its weight is also that of an embedding"

# Traced sizes; any length above one that is not a usual constant will do.
_BATCH, _LENGTH = 2, 11

_TRACE_CHECKS = {
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten.sym_constrain_range.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
}


def capture(model: nn.Module, *, example_inputs: tuple[Tensor, ...] | None = None, exclude: Iterable[str] = ()) -> Program:
    """Capture a model as one graph with symbolic sizes.

    model: a causal language model of transformers (it has `.config` and takes `input_ids`), captured without a cache over
        `input_ids` int64 [batch, length], both symbolic; or any module whose inputs are tensors.
    example_inputs: positional inputs of any other module; only their shapes and dtypes matter. Their first axis becomes symbolic
        where the module allows it.
    exclude: patterns (as of a shell) of qualified names of linears that stay as they are.

    Raises `CaptureError` if the model cannot be captured, naming the module; `ModelError` for a pattern that matches no linear.
    """
    excluded = _excluded(model, tuple(exclude))
    exported = _export(model, example_inputs)
    program = _program(model, exported)
    if example_inputs is None:
        _check_symbolic(program)
    program.excluded = _embedding_linears(program) | excluded
    program.remarks += unreached(program)
    return program


def _excluded(model: nn.Module, patterns: tuple[str, ...]) -> dict[str, str]:
    stored = model.named_parameters(remove_duplicate=False)
    names = [name.removesuffix(".weight") for name, p in stored if p.ndim == 2 or (p.ndim == 3 and not name.endswith(".weight"))]
    linears = [name for name in names if not isinstance(_submodule(model, name), nn.Embedding)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = {name: OUTPUT_HEAD for name, module in model.named_modules(remove_duplicate=False) if module is head and module is not None}
    for pattern in patterns:
        matched = [name for name in linears if fnmatchcase(name, pattern)]
        if not matched:
            raise ModelError(f"the pattern {pattern!r} matches no linear; the linears are named like {', '.join(linears[:3]) or '(none)'}")
        found |= {name: f"excluded by the pattern {pattern!r}" for name in matched}
    return found


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _embedding_linears(program: Program) -> dict[str, str]:
    """Linears that share their weight with a table that the graph looks up."""
    tables = {
        id(program.tensor(program.tensors[node.args[0].name]))
        for node in program.graph.nodes
        if node.target is torch.ops.aten.embedding.default and isinstance(node.args[0], fx.Node) and node.args[0].name in program.tensors
    }
    named = program.module.named_parameters(remove_duplicate=False)
    names = [name.removesuffix(".weight") for name, value in named if id(value) in tables]
    return {name: EMBEDDING for name in names if not isinstance(_submodule(program.module, name), nn.Embedding)}


def _export(model: nn.Module, example_inputs: tuple[Tensor, ...] | None) -> ExportedProgram:
    parameters = inspect.signature(model.forward).parameters
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
    args: tuple[Tensor, ...]
    kwargs: dict[str, Any] = {}
    if example_inputs is not None:
        args = _stretched(example_inputs)
        for value in args:
            if value.ndim:
                shapes[value] = {0: Dim.AUTO}
    elif hasattr(model, "config") and "input_ids" in parameters:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        ids = torch.zeros(_BATCH, _LENGTH, dtype=torch.int64, device=device)
        shapes[ids] = {0: Dim.AUTO, 1: Dim.AUTO}
        args, kwargs = (), {"input_ids": ids}
        if "use_cache" in parameters:
            kwargs["use_cache"] = False
    else:
        raise CaptureError(
            f"{type(model).__name__} is not a causal language model of transformers, so its inputs are unknown: give example_inputs, "
            f"one tensor for each input of forward({', '.join(parameters)})"
        )
    try:
        with _evaluating(model), _without_cache(model), _by_groups(model), _quiet(), torch.no_grad():
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise CaptureError(_explanation(model, error)) from error


def _stretched(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A first axis of one element would be taken for a constant, so a batch of one is traced as a batch of two."""
    for value in inputs:
        if not isinstance(value, Tensor):
            raise CaptureError(f"example_inputs must be tensors, got {type(value).__name__}")
    if all(value.ndim and value.shape[0] == 1 for value in inputs):
        return tuple(torch.cat([value, value]) for value in inputs)
    # The same tensor twice would be taken for one input.
    return tuple(value.view_as(value) for value in inputs)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each module has its own flag again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """A multimodal model takes no `use_cache`, but its language part does what its configuration says."""
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else None
    before = getattr(text, "use_cache", None)
    if not before:
        yield
        return
    text.use_cache = False
    try:
        yield
    finally:
        text.use_cache = before


@contextmanager
def _by_groups(model: nn.Module) -> Iterator[None]:
    """The experts of transformers multiplied by one operator, whatever the model is set to: no graph can hold a loop over those chosen."""
    implementation = getattr(getattr(model, "config", None), "_experts_implementation", None)
    change: Any = getattr(model, "set_experts_implementation", None)
    if implementation == "grouped_mm" or change is None or not any(map(routes_experts, model.modules())):
        yield
        return
    change("grouped_mm")
    try:
        yield
    finally:
        change(implementation)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the pages that torch logs when an export fails: the error says it in one line, and its cause says the rest."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _explanation(model: nn.Module, error: BaseException) -> str:
    """One message: the innermost module of the model that was running, the line, and the reason."""
    names = {id(module): name for name, module in model.named_modules()}
    name, where, depth = "", "", -1
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        for level, (frame, line) in enumerate(traceback.walk_tb(cause.__traceback__)):
            code = frame.f_code
            owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            if id(owner) in names and isinstance(owner, nn.Module) and level >= depth:
                name, depth = names[id(owner)], level
                where = f" at {code.co_filename}:{line}" if "torch/nn/modules/module.py" not in code.co_filename else where
        cause = cause.__cause__ or cause.__context__
    module = model.get_submodule(name)
    place = f"module {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
    lines = [line for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    return f"{place} cannot be captured{where}: {reason}"


def _program(model: nn.Module, exported: ExportedProgram) -> Program:
    graph_module = exported.graph_module
    graph = graph_module.graph
    inline_regions(graph_module)
    live = named_tensors(model)
    first = {id(value): name for name, value in reversed(live.items())}
    placeholders = {node.name: node for node in graph.find_nodes(op="placeholder")}
    tensors: dict[str, str] = {}
    owner: dict[str, fx.Node] = {}
    inputs: list[str] = []
    for spec in exported.graph_signature.input_specs:
        node = placeholders[spec.arg.name]
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            assert spec.target is not None
            name = first[id(live[spec.target])]
            if name in owner:
                node.replace_all_uses_with(owner[name])
                graph.erase_node(node)
            else:
                owner[name] = node
                tensors[node.name] = name
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            _embed_constant(graph_module, node, exported.constants[spec.target or ""])
        elif isinstance(node.meta.get("val"), Tensor):
            inputs.append(node.name)
        elif node.users:
            raise CaptureError(f"the input {node.name!r} of the model is not a tensor; only tensors can be inputs of a captured graph")
        else:
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target in _TRACE_CHECKS:
            graph.erase_node(node)
    make_functional(graph)
    remove_dead_code(graph)
    written = sorted(tensors[node.name] for node in mutated(graph) if node.name in tensors)
    if written:
        raise CaptureError(f"the forward of the model writes to {', '.join(written)}; a captured model must not change its own state")
    for name in [name for name in tensors if not placeholders[name].users]:
        graph.erase_node(placeholders[name])
        del tensors[name]
    graph.lint()
    graph_module.recompile()
    return Program(graph_module, tensors, tuple(inputs), model)


def _embed_constant(graph_module: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    graph_module.register_buffer(node.name, value, persistent=False)
    after = graph_module.graph.find_nodes(op="placeholder")[-1]
    with graph_module.graph.inserting_after(after):
        constant = graph_module.graph.get_attr(node.name)
    constant.meta = dict(node.meta)
    node.replace_all_uses_with(constant)
    graph_module.graph.erase_node(node)


def _check_symbolic(program: Program) -> None:
    for node in program.graph.find_nodes(op="placeholder"):
        # A size that the model fixed is an int, or a symbol that is known to be one.
        shape = [str(size) for size in node.meta["val"].shape] if node.name in program.inputs else []
        if any(size.isdecimal() for size in shape):
            raise CaptureError(
                f"the forward of {type(program.module).__name__} fixes the shape of {node.name!r} to [{', '.join(shape)}]; "
                "batch and length must be free: look for code that branches on the shape of its input"
            )
