"""Quantize: weights are packed once, signs follow what is shared, and the recorded errors are the real ones."""

import json

import pytest
import torch
from torch import fx, nn

from qpc.capture import capture
from qpc.ir.annotation import annotate, annotation
from qpc.ir.printer import to_json, to_text
from qpc.ir.program import Program
from qpc.passes.canonicalize import Canonicalize
from qpc.passes.fusion import Fusion
from qpc.passes.quantize import GAUSSIAN_KURTOSIS, Quantize, excess_kurtosis, relative_error, sign_owners, site_of
from qpc.quant.scalar import ScalarQuantizer


class Branches(nn.Module):
    """a and b read one value; c applies the weight of b to another one; d stands alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(32, 32) for _ in range(4))
        self.c.weight = self.b.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(torch.relu(self.c(torch.tanh(self.a(x) + self.b(x)))))


def allocated(model: nn.Module, quantizer: ScalarQuantizer | None = None, inputs: int = 32) -> Program:
    """A program in which every linear has one quantizer."""
    program = capture(model, example_inputs=(torch.randn(4, inputs),))
    for step in (Canonicalize(), Fusion()):
        step.run(program)
    for node in program.linears():
        group = annotation(node).group
        assert group is not None
        annotate(node, annotation(node).but(quantizer=quantizer or ScalarQuantizer(4), group=group.subset((site_of(node).name,))))
    return program


def linears(program: Program) -> dict[str, fx.Node]:
    return {site_of(node).name: node for node in program.linears()}


def test_signs_follow_shared_values_and_shared_weights() -> None:
    torch.manual_seed(0)
    program = allocated(Branches())
    nodes = linears(program)
    assert sign_owners(list(nodes.values())) == {"a": "a", "b": "a", "c": "a", "d": "d"}
    Quantize(seed=3).run(program)
    signs = {name: program.packed[name].rotation.signs for name in nodes}
    assert torch.equal(signs["a"], signs["b"]) and torch.equal(signs["b"], signs["c"])
    assert not torch.equal(signs["a"], signs["d"])
    assert program.packed["b"] is program.packed["c"]


def test_the_seed_decides_the_signs() -> None:
    torch.manual_seed(0)
    model = Branches()
    signs = []
    for seed in (0, 0, 1):
        program = allocated(model)
        Quantize(seed=seed).run(program)
        signs.append(program.packed["d"].rotation.signs)
    assert torch.equal(signs[0], signs[1])
    assert not torch.equal(signs[0], signs[2])


def test_recorded_distortion_is_that_of_the_restored_weight() -> None:
    torch.manual_seed(0)
    model = Branches()
    program = allocated(model)
    Quantize().run(program)
    for name, note in program.decisions.items():
        packed = program.packed[name]
        actual = relative_error(model.get_submodule(name).weight.detach(), packed.restored())
        assert note.distortion == pytest.approx(actual, rel=1e-3)
        assert note.weight_bytes == packed.nbytes


def test_rotation_makes_rows_gaussian() -> None:
    """Heavy tails: a kurtosis of dozens before (43 for cubes of normals), close to none after."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 64))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(64, 1024) ** 3)
    program = capture(model, example_inputs=(torch.randn(2, 1024),))
    for step in (Canonicalize(), Fusion()):
        step.run(program)
    for node in program.linears():
        annotate(node, annotation(node).but(quantizer=ScalarQuantizer(4)))
    Quantize().run(program)
    before, after = program.decisions["0"].kurtosis
    assert before > 20
    assert abs(after) < 0.2


def outliers(block: int | None) -> tuple[Program, list[str]]:
    """A quantized linear with one input in 256 a hundred times as large as the others, and the remarks of the pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 64))
    with torch.no_grad():
        model[0].weight[:, ::256] *= 100
    program = allocated(model, inputs=1024)
    return program, [str(remark) for remark in Quantize(rotation_block=block).run(program).remarks]


def test_rows_that_stay_far_from_gaussian_are_remarked() -> None:
    program, remarks = outliers(block=8)
    assert program.packed["0"].rotation.block == 8
    assert program.decisions["0"].kurtosis[1] > GAUSSIAN_KURTOSIS
    assert len(remarks) == 1 and "0: still far from Gaussian after the rotation in blocks of 8" in remarks[0]
    before, after = program.decisions["0"].kurtosis
    assert f"{before:.2f} -> {after:.2f}" in to_text(program)
    (dumped,) = [node["linear"] for node in json.loads(to_json(program))["nodes"] if "linear" in node]
    assert dumped["kurtosis"] == [before, after]


def test_a_full_rotation_spreads_outliers() -> None:
    program, remarks = outliers(block=None)
    assert program.packed["0"].rotation.block == 1024
    assert remarks == []


def test_kurtosis_and_error_on_known_cases() -> None:
    assert excess_kurtosis(torch.tensor([[1.0, -1.0], [2.0, -2.0], [0.0, 0.0]])) == pytest.approx(-2)
    assert excess_kurtosis(torch.zeros(2, 3)) == 0
    assert relative_error(torch.ones(2, 2), torch.zeros(2, 2)) == 1
    assert relative_error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
