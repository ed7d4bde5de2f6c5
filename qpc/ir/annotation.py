"""What qpc knows about a node: one frozen value under `node.meta["qpc"]`."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from qpc.quant.quantizer import Quantizer

KEY = "qpc"


@dataclass(frozen=True)
class LinearShape:
    """Shape of a linear's weight, always [out_features, in_features], however the model stores it."""

    out_features: int
    in_features: int

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features

    def __str__(self) -> str:
        return f"{self.out_features}x{self.in_features}"


@dataclass(frozen=True)
class LinearSite:
    """One place in the graph where a linear is applied.

    name: qualified name of the module that owns the weight ("model.layers.0.self_attn.q_proj").
    weight, bias: qualified names of the parameters.
    transposed: the parameter is stored [in_features, out_features] (GPT-2's Conv1D).
    experts: the parameter is a stack of so many matrices, [experts, out_features, in_features] (or each transposed), and `shape` is that
    of all of them below each other; None: it is one matrix.
    """

    name: str
    weight: str
    shape: LinearShape
    bias: str | None = None
    transposed: bool = False
    experts: int | None = None


@dataclass(frozen=True)
class FusionGroup:
    """Linears that read the same value and may run as one kernel.

    members: names of the sites, in graph order. input: name of the fx node that the first of them reads; the others read it too, or a
    node of the same value. shapes: of each member.
    """

    members: tuple[str, ...]
    input: str
    shapes: tuple[LinearShape, ...]

    @property
    def shape(self) -> LinearShape:
        """All members stacked along the rows."""
        return LinearShape(sum(shape.out_features for shape in self.shapes), self.shapes[0].in_features)

    def subset(self, members: Collection[str]) -> "FusionGroup":
        """The group of these members alone, in graph order. Every subset of a legal group is legal."""
        kept = [(name, shape) for name, shape in zip(self.members, self.shapes, strict=True) if name in members]
        return FusionGroup(tuple(name for name, _ in kept), self.input, tuple(shape for _, shape in kept))


@dataclass(frozen=True)
class Annotation:
    """Everything known about one linear node; later stages fill later fields.

    group: the largest legal group of the site (GROUPED), then the one chosen (ALLOCATED); a group of one is a single.
    quantizer: None at ALLOCATED and later means that the linear stays as it is.
    sensitivity: nats of KL per unit of relative squared error of this weight.
    share: of white rounding errors, what error feedback is expected to leave at the output of the linear (GROUPED); None without feedback.
    distortion: expected (ALLOCATED), then measured (QUANTIZED) relative squared error.
    weight_bytes: expected, then actual stored bytes.
    kurtosis: excess kurtosis of the weight's rows before and after the rotation.
    remaining: the share that it did leave (QUANTIZED).
    latency_ps: predicted time of its applications in one step (ALLOCATED), of what runs as one with others its share by weights.
    kept_latency_ps: the same for the linear as the model has it, by itself. Both None if no time was predicted.
    """

    site: LinearSite | None = None
    group: FusionGroup | None = None
    quantizer: Quantizer | None = None
    sensitivity: float | None = None
    share: float | None = None
    distortion: float | None = None
    weight_bytes: int | None = None
    kurtosis: tuple[float, float] | None = None
    remaining: float | None = None
    latency_ps: float | None = None
    kept_latency_ps: float | None = None

    def but(self, **changes: Any) -> "Annotation":
        """A copy with some fields replaced."""
        return replace(self, **changes)


def annotation(node: fx.Node) -> Annotation:
    """The annotation of a node; an empty one if it has none."""
    found = node.meta.get(KEY)
    return found if isinstance(found, Annotation) else Annotation()


def site_of(node: fx.Node) -> LinearSite:
    """The site of a linear node."""
    site = annotation(node).site
    assert site is not None, f"{node.name} is not a linear site"
    return site


def annotate(node: fx.Node, value: Annotation) -> None:
    """Replace the annotation of a node."""
    node.meta[KEY] = value


def fake_value(node: fx.Node) -> Any:
    """What the capture knows of the value of a node: a fake tensor, a symbolic number, a tuple of them, or None if it knows nothing."""
    return node.meta.get("val", node.meta.get("example_value"))
