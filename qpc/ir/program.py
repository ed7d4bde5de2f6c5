"""A model on its way through the compiler: an fx graph, its stage, and where its parameters live."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from qpc.errors import ModelError
from qpc.ir.annotation import Annotation, annotation
from qpc.ir.source import Source
from qpc.ir.stage import Stage
from qpc.ir.table import Table
from qpc.quant.quantizer import PackedWeight
from qpc.safetensors_source import OnDisk


@dataclass(frozen=True)
class Remark:
    """Why a pass did not do what one might have expected of it."""

    pass_name: str
    subject: str
    reason: str

    def __str__(self) -> str:
        return f"{self.pass_name}: {self.subject}: {self.reason}"


@dataclass
class Program:
    """A captured model. torch.fx is the only graph; every other view of it is read-only.

    graph_module: its placeholders are first the parameters and buffers, then the inputs of the model.
    tensors: qualified name of the parameter or buffer that each such placeholder stands for, by placeholder name. Tied parameters
        share one placeholder, under the first of their names.
    inputs: names of the placeholders that are inputs of the model, in order.
    module: the module whose parameters the names in `tensors` refer to; never modified before LOWERED, but folding puts a copy with other
        parameters in its place.
    excluded: names of linear modules that stay as they are, with the reason.
    rotated: names of the weights whose inputs are rotated already, so that they are packed as they are (from GROUPED on).
    packed: packed weight of each quantized site by site name (from QUANTIZED on).
    tables: packed embeddings and output heads by name of their parameter (from GROUPED on, where they are asked for).
    tuned: new values of parameters that are not packed, by qualified name (from QUANTIZED on); the module keeps the old ones.
    decisions: annotation of every site by name (from QUANTIZED on); outlives the nodes that lowering replaces.
    history: names of the passes already run, in order; a graph may go through several pipelines.
    calibration: the inputs on which second moments were taken, in words; None: there were none.
    allocation: what the solver chose, a `qpc.solver.Allocation` (from ALLOCATED on). The IR knows nothing of solvers, hence the type.
    source: where values are read from that the module has on the meta device; None: it has all of them.
    """

    graph_module: fx.GraphModule
    tensors: dict[str, str]
    inputs: tuple[str, ...]
    module: nn.Module
    stage: Stage = Stage.CAPTURED
    excluded: dict[str, str] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)
    rotated: set[str] = field(default_factory=set)
    packed: dict[str, PackedWeight] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    tuned: dict[str, Tensor] = field(default_factory=dict)
    decisions: dict[str, Annotation] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)
    calibration: str | None = None
    allocation: object | None = None
    source: Source | None = None

    @property
    def graph(self) -> fx.Graph:
        """The fx graph."""
        return self.graph_module.graph

    @property
    def device(self) -> torch.device:
        """That of the first parameter; the CPU if there is none."""
        return next((value.device for value in self.module.parameters()), torch.device("cpu"))

    def linears(self) -> Iterator[fx.Node]:
        """The nodes that carry a `LinearSite`, in graph order (from CANONICAL on)."""
        return (node for node in self.graph.nodes if annotation(node).site is not None)

    def tensor(self, name: str) -> Tensor:
        """The live parameter or buffer of this qualified name."""
        owner, _, leaf = name.rpartition(".")
        value = getattr(self.module.get_submodule(owner), leaf)
        assert isinstance(value, Tensor)
        return value

    def values(self, name: str) -> Tensor:
        """The values of this parameter or buffer, without gradient: live ones, or read from the source."""
        live = self.tensor(name).detach()
        return self.source.read(name) if self.source is not None and live.is_meta else live

    def where(self, name: str) -> Tensor | OnDisk:
        """`values`, or where they are if they would have to be read."""
        live = self.tensor(name).detach()
        return self.source.find(name) if self.source is not None and live.is_meta else live

    def home(self, name: str) -> torch.device:
        """The device of `values`."""
        live = self.tensor(name)
        return self.source.device if self.source is not None and live.is_meta else live.device

    def latest(self, name: str) -> Tensor:
        """The tuned value of this qualified name, else the live one."""
        return self.tuned[name] if name in self.tuned else self.tensor(name)

    def bind(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """The value of every placeholder by its name, in the order of the graph: live parameters and buffers, then `inputs`.

        Raises `ModelError` if the number of inputs is wrong.
        """
        if len(inputs) != len(self.inputs):
            raise ModelError(f"the program takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), got {len(inputs)}")
        given = dict(zip(self.inputs, inputs, strict=True))
        names = [node.name for node in self.graph.find_nodes(op="placeholder")]
        return {name: given[name] if name in given else self.tensor(self.tensors[name]) for name in names}

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Execute the graph eagerly on these inputs, without gradients: the outputs of the model, flattened."""
        with torch.no_grad():
            outputs = self.graph_module(*self.bind(inputs).values())
        return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its qualified names, tied ones under all of them: parameters first."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
