"""`torch.compile(model, backend="qpalette", options={"budget": 3.25})`: the same passes, through Dynamo's door.

Dynamo hands over one graph per frame and shape. The weights are decided and packed once per module (by the same steps as in
`qpc.compile`, so both doors give the same numbers); each graph then adopts them, is lowered, and goes on to an inner backend.
"""

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import list_backends, lookup_backend
from torch._dynamo.source import ConstantSource
from torch._dynamo.symbolic_convert import InstructionTranslator

from qpc.compiler import build, decide, lowering
from qpc.errors import CaptureError, SettingsError
from qpc.inductor.hook import register
from qpc.ir.program import Program
from qpc.options import Options
from qpc.passes.adopt import Adopt
from qpc.passes.canonicalize import Canonicalize
from qpc.passes.fusion import Fusion
from qpc.passes.operands import Operands
from qpc.passes.pipeline import Pipeline
from qpc.settings import Settings

LEGAL = (
    "budget",
    "effort",
    "exclude",
    "seed",
    "same_quantizer_in_group",
    "rotation_block",
    "embeddings",
    "calibration",
    "row_feedback",
    "sensitivity",
    "tune",
    "tokenizer",
    "gpu",
    "batch",
    "inner",
    "mode",
)
CACHE = "_qpc_program"
"""Attribute of a module that holds its program, with the options and versions of the weights that it was made from."""
_COUNT = itertools.count()
"""Numbers the graphs of this process in the dumps."""


class Mode(StrEnum):
    """Modes of Inductor, as `torch.compile` names them; it takes none beside options. REDUCE_OVERHEAD: launches go into CUDA graphs."""

    DEFAULT = "default"
    REDUCE_OVERHEAD = "reduce-overhead"
    MAX_AUTOTUNE = "max-autotune"
    MAX_AUTOTUNE_NO_CUDAGRAPHS = "max-autotune-no-cudagraphs"


@dataclass(frozen=True)
class BackendOptions:
    """Options of the backend. inner: the backend that compiles the lowered graph. mode: that of Inductor."""

    options: Options
    inner: str = "inductor"
    mode: Mode = Mode.DEFAULT

    @staticmethod
    def parse(options: Mapping[str, Any] | None) -> "BackendOptions":
        """Check the mapping that `torch.compile` passes on. Raises `SettingsError` with the legal names, and as `Options.of` does."""
        given = dict(options or {})
        unknown = sorted(given.keys() - set(LEGAL))
        if unknown:
            raise SettingsError(f"unknown option {unknown[0]!r} of the backend qpalette; known: {', '.join(LEGAL)}")
        if "budget" not in given:
            raise SettingsError('the backend qpalette needs a budget: torch.compile(model, backend="qpalette", options={"budget": 3.25})')
        inner = str(given.pop("inner", "inductor"))
        known = [name for name in list_backends(None) if name != "qpalette"]
        if inner not in known:
            raise SettingsError(f"unknown inner backend {inner!r}; known: {', '.join(known)}")
        named = given.pop("mode", None)
        if named is not None and named not in list(Mode):
            raise SettingsError(f"unknown mode {named!r}; known: {', '.join(Mode)}")
        if named is not None and inner != "inductor":
            raise SettingsError(f"mode={named!r} is one of Inductor, but the inner backend is {inner!r}; leave one of them out")
        return BackendOptions(Options.of(**given, fold=False), inner, Mode(named or Mode.DEFAULT))


def qpalette(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """The backend; found by name through the entry-point group `torch_dynamo_backends`.

    options: `budget` (required), `effort`, `exclude`, `seed`, `same_quantizer_in_group`, `rotation_block`, `embeddings`, `calibration`,
        `row_feedback`, `sensitivity`, `tune`, `tokenizer`, `gpu`, `batch` as in `qpc.compile`; `inner` and `mode` as in `BackendOptions`.
    mode: the same, where `torch.compile` was given one.

    Nothing is folded here: what a graph gets from outside (hidden states, caches) is not known to be rotated. A model that `qpc.compile`
    folded can be compiled by any backend.
    """
    parsed = BackendOptions.parse(options)
    owner = _frame_module()
    program = _program(graph_module, example_inputs, owner)
    if program.tensors:
        _lower(program, parsed.options)
        _name_sources(graph_module)
    compile_inner = lookup_backend(parsed.inner)
    if parsed.inner == "inductor":
        register()
        compile_inner = torch._TorchCompileInductorWrapper(mode or str(parsed.mode), None, None)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        compiled = compile_inner(program.graph_module, list(example_inputs))

    def run(*args: Any) -> Any:
        with torch.no_grad():
            return compiled(*args)

    return run


def _lower(program: Program, options: Options) -> None:
    """All passes, in place; a graph without linears is left as it is."""
    source = _decided(program.module, options)
    if source is not None:
        program.excluded.update(source.excluded)
        dump = Settings.from_environment().dump
        graphs = dump / f"graph_{next(_COUNT)}" if dump is not None else None
        Pipeline((Canonicalize(), Fusion(), Adopt(source), *lowering(source), Operands())).run(program, dump=graphs)
    else:
        with _outside_dynamo():
            decide(program, options)
        Pipeline((*lowering(program), Operands())).run(program)


def _name_sources(graph_module: fx.GraphModule) -> None:
    """Give the packed tensors a source, as Dynamo does for every tensor that it bakes into a graph; AOTAutograd asks for it."""
    sources = getattr(graph_module, "_param_name_to_source", None)
    if sources is not None:
        for name, _ in graph_module.named_buffers():
            sources.setdefault(name, ConstantSource(name))


def _decided(owner: nn.Module, options: Options) -> Program | None:
    """The program of the whole module at QUANTIZED, made once; None if the module cannot be captured on its own."""
    key = (options, tuple((parameter.data_ptr(), parameter._version) for parameter in owner.parameters()))
    known: tuple[object, Program | None] | None = owner.__dict__.get(CACHE)
    if known is not None and known[0] == key:
        return known[1]
    try:
        with _outside_dynamo():
            program = build(owner, options)
    except CaptureError as error:
        warnings.warn(f"qpalette decides on this graph alone, with inputs of its own shape: {error}", stacklevel=2)
        program = None
    owner.__dict__[CACHE] = (key, program)
    return program


@contextmanager
def _outside_dynamo() -> Iterator[None]:
    """Work that captures or runs graphs of its own must not see the trace that Dynamo is in the middle of."""
    with torch._guards.tracing(None), torch.enable_grad():
        yield


def _frame_module() -> nn.Module | None:
    """The module whose forward Dynamo is compiling, if the frame is a method of one, or a decorator around it that takes only `*args`."""
    try:
        root = InstructionTranslator.current_tx().output.root_tx
    except AttributeError:  # called by hand, not by Dynamo
        return None
    owner = root.f_locals.get("self")
    names, rest, _ = inspect.getargs(root.f_code)
    if not names:
        owner = next(iter(root.f_locals.get(rest or "", ())), None)
    return owner if isinstance(owner, nn.Module) else None


def _program(graph_module: fx.GraphModule, example_inputs: Sequence[Any], owner: nn.Module | None) -> Program:
    """Dynamo's graph as a program: which placeholder is which parameter or buffer of the module, and which are inputs."""
    module = owner if owner is not None else nn.Module()
    names = {id(t): name for name, t in [*module.named_parameters(), *module.named_buffers()]}
    tensors, inputs = {}, []
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for node, example in zip(placeholders, example_inputs, strict=True):
        if id(example) not in names and isinstance(example, nn.Parameter):
            module.register_parameter(node.name, example)
            names[id(example)] = node.name
        if id(example) in names:
            tensors[node.name] = names[id(example)]
        else:
            inputs.append(node.name)
        if "val" not in node.meta and "example_value" in node.meta:
            node.meta["val"] = node.meta["example_value"]
    return Program(graph_module, tensors, tuple(inputs), module)
