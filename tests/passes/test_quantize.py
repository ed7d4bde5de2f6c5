"""Quantize: weights are packed once, signs follow what is shared, and the recorded errors are the real ones."""

import copy

import pytest
import torch
from torch import fx, nn

from qpc.calibration import Samples
from qpc.capture import capture
from qpc.ir.annotation import annotate, annotation, site_of
from qpc.ir.program import Program
from qpc.moments import MomentStream
from qpc.passes.canonicalize import Canonicalize
from qpc.passes.feedbacks import Feedbacks, by_input, sign_owners
from qpc.passes.fusion import Fusion
from qpc.passes.packing import excess_kurtosis, relative_error
from qpc.passes.quantize import Quantize
from qpc.quant.moment import Moment
from qpc.quant.scalar import ScalarQuantizer
from tests.families import grouped
from tests.test_moments import hooked


class Branches(nn.Module):
    """a and b read one value; c applies the weight of b to another one; d stands alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(64, 64) for _ in range(4))
        self.c.weight = self.b.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(torch.relu(self.c(torch.tanh(self.a(x) + self.b(x)))))


def allocated(model: nn.Module, quantizer: ScalarQuantizer | None = None) -> Program:
    """A program in which every linear has one quantizer."""
    program = capture(model, example_inputs=(torch.randn(4, 64),))
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


def test_weights_come_input_by_input() -> None:
    torch.manual_seed(0)
    program = allocated(Branches())
    nodes = list(program.linears())
    stages = by_input(program, nodes, sign_owners(nodes))
    assert [[[site_of(node).name for node in sharing] for sharing in stage] for stage in stages] == [[["a"]], [["b", "c"]], [["d"]]]
    program = grouped("llama")
    nodes = list(program.linears())
    assert [len(stage) for stage in by_input(program, nodes, sign_owners(nodes))] == [3, 1, 2, 1] * 2


def test_signs_are_one_value_however_often_the_weights_are_asked_for() -> None:
    """What reads one input then still has one rotation in a run that goes on where another was interrupted."""
    program = allocated(Branches())
    feedbacks = Feedbacks(program, tuple(program.linears()), None)
    once, again = ([job.rotation for jobs in feedbacks.in_turn(None) for job in jobs] for _ in range(2))
    assert len(once) == 3 and all(one is other for one, other in zip(once, again, strict=True))


@pytest.mark.parametrize("sequential", [True, False])
def test_moments_are_those_behind_the_weights_already_packed(sequential: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is that of a model whose weights before the linear are the restored ones, or of the original."""
    seen: list[Moment] = []
    original = MomentStream.moment
    monkeypatch.setattr(MomentStream, "moment", lambda *call: seen.append(original(*call)) or seen[-1])
    torch.manual_seed(0)
    model = Branches()
    x = torch.randn(64, model.a.in_features)
    program = allocated(model, ScalarQuantizer(2))
    samples = Samples((x[:40], x[40:56]), (x[56:],), "given")
    Quantize(samples=samples, sequential=sequential).run(program)
    assert len(seen) == 3, "a and b read one value, but b has another input too"
    twin = copy.deepcopy(model)
    for moment, names in zip(seen, (("a",), ("b", "c"), ("d",)), strict=True):
        for part, found in ((x[:56], moment), (x[56:], moment.held_out)):
            expected = torch.stack(list(hooked(twin, set(names), [part]).values())).mean(0)
            assert found is not None and found.count == len(part) * len(names)
            torch.testing.assert_close(found.matrix, expected.float(), rtol=1e-4, atol=1e-5)
        if sequential:
            with torch.no_grad():
                twin.get_submodule(names[0]).weight.copy_(program.packed[names[0]].restored())


def test_only_feedback_leaves_a_share_of_the_error() -> None:
    torch.manual_seed(0)
    model = Branches()
    for samples in (None, Samples((torch.randn(40, model.a.in_features),), (), "given")):
        program = allocated(model)
        Quantize(samples=samples).run(program)
        shares = [note.remaining for note in program.decisions.values()]
        assert all(share is None if samples is None else share is not None and 0 < share < 1.5 for share in shares)


def test_kurtosis_and_error_on_known_cases() -> None:
    assert excess_kurtosis(torch.tensor([[1.0, -1.0], [2.0, -2.0], [0.0, 0.0]])) == pytest.approx(-2)
    assert excess_kurtosis(torch.zeros(2, 3)) == 0
    assert relative_error(torch.ones(2, 2), torch.zeros(2, 2)) == 1
    assert relative_error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
