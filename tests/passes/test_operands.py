"""Operands: one operand for all that read a rotation, the same numbers, and a reason wherever there is none."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from qpc.capture import capture
from qpc.ir.annotation import annotate, annotation
from qpc.ir.program import Program
from qpc.ir.stage import Stage
from qpc.kernels.select import Implementation, Support
from qpc.passes.canonicalize import Canonicalize
from qpc.passes.fusion import Fusion
from qpc.passes.lower import Lower
from qpc.passes.operands import Operands
from qpc.passes.pipeline import Pipeline
from qpc.passes.quantize import Quantize
from qpc.quant.quantizer import Quantizer, UniformQuantizer
from qpc.quant.scalar import ScalarQuantizer
from qpc.quant.trellis import TrellisQuantizer

TRELLIS = TrellisQuantizer(4, 10)


def supports(quantizers: Sequence[UniformQuantizer], batch: int, dtype: torch.dtype, device: torch.device) -> Support:
    """Any trellis, by the definition of the operators."""
    return Support(Implementation.CPU, "by definition")


def supports_nothing(quantizers: Sequence[UniformQuantizer], batch: int, dtype: torch.dtype, device: torch.device) -> Support:
    return Support(None, "no tensor cores")


class Fixed(nn.Module):
    """a and b read one value of so many rows, c another; b and c have no bias."""

    def __init__(self, *rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.a, self.b, self.c = nn.Linear(64, 128), nn.Linear(64, 64, bias=False), nn.Linear(128, 20, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(*self.rows, 64)
        return self.c(torch.tanh(self.a(x))) + self.b(x)[..., :20]


def lowered(model: nn.Module, x: Tensor, quantizers: dict[str, Quantizer] | None = None, rotated: Sequence[str] = ()) -> Program:
    """Every linear by itself; a trellis where nothing else is given. rotated: weights whose inputs count as rotated already."""
    program = capture(model, example_inputs=(x,))
    Pipeline((Canonicalize(), Fusion())).run(program)
    for node in program.linears():
        found = annotation(node)
        assert found.group is not None and found.site is not None
        quantizer = (quantizers or {}).get(found.site.name, TRELLIS)
        annotate(node, found.but(quantizer=quantizer, group=found.group.subset((found.site.name,))))
    program.rotated.update(rotated)
    program.stage = Stage.ALLOCATED
    Pipeline((Quantize(), Lower())).run(program)
    return program


def count(program: Program, name: str) -> int:
    return sum(str(node.target) == f"qpc.{name}.default" for node in program.graph.nodes)


@pytest.mark.parametrize("rows", [(1,), (16,), (2, 3)], ids=str)
def test_one_operand_for_all_that_read_a_value(rows: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 32 * torch.Size(rows).numel())
    program = lowered(Fixed(*rows), x)
    expected = program.run((x,))[0]
    result = Pipeline((Operands(supports),)).run(program)["operands"]
    assert result.changed == ("a", "b", "c") and not result.remarks
    assert (count(program, "rotate"), count(program, "trellis_linear")) == (0, 0)
    assert (count(program, "rotate_operand"), count(program, "operand_linear")) == (2, 3)
    found = program.run((x,))[0]
    assert found.shape == expected.shape and (found - expected).norm() <= 2e-4 * expected.norm()
    assert {annotation(node).site.name for node in program.linears()} == {"a", "b", "c"}  # type: ignore[union-attr]


def test_values_that_are_rotated_already_are_packed_once_as_they_are() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    program = lowered(Fixed(4), x, rotated=("a.weight", "b.weight"))
    assert count(program, "rotate") == 1
    expected = program.run((x,))[0]
    result = Pipeline((Operands(supports),)).run(program)["operands"]
    assert result.changed == ("a", "b", "c")
    assert (count(program, "pack_operand"), count(program, "rotate_operand"), count(program, "operand_linear")) == (1, 1, 3)
    found = program.run((x,))[0]
    assert (found - expected).norm() <= 2e-4 * expected.norm()


def test_a_rotation_that_others_read_stays_for_them() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    program = lowered(Fixed(4), x, {"b": ScalarQuantizer(4)})
    expected = program.run((x,))[0]
    result = Pipeline((Operands(supports),)).run(program)["operands"]
    assert result.changed == ("a", "c")
    assert (count(program, "rotate"), count(program, "scalar_linear"), count(program, "rotate_operand")) == (1, 1, 2)
    found = program.run((x,))[0]
    assert (found - expected).norm() <= 2e-4 * expected.norm()


@pytest.mark.parametrize(
    ("model", "batch", "given", "reason"),
    [
        (Fixed(17), 17, supports, "17 rows"),
        (Fixed(2), 2, supports_nothing, "no tensor cores"),
        (nn.Sequential(nn.Linear(64, 64)), 4, supports, "number of rows is not fixed"),
    ],
    ids=["many rows", "no support", "symbolic batch"],
)
def test_says_why_not(model: nn.Module, batch: int, given: object, reason: str) -> None:
    program = lowered(model, torch.randn(batch, 64))
    before = str(program.graph)
    result = Pipeline((Operands(given),)).run(program)["operands"]  # type: ignore[arg-type]
    assert not result.changed and str(program.graph) == before
    assert {remark.subject for remark in result.remarks} == set(program.packed)
    assert all(reason in remark.reason for remark in result.remarks)


def test_this_machine_says_why_not() -> None:
    """The default asks the kernel."""
    program = lowered(Fixed(2), torch.randn(2, 64))
    result = Pipeline((Operands(),)).run(program)["operands"]
    assert not result.changed and all("compute capability" in remark.reason for remark in result.remarks)
