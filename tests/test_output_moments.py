"""Moments of gradients: what they mean, how many there is memory for, and what a compile makes of them."""

from pathlib import Path

import pytest
import torch

import qpc
from qpc.budget import Budget
from qpc.calibration import Given, Samples
from qpc.capture import capture
from qpc.compiler import captured, group, prepare
from qpc.errors import SettingsError
from qpc.ir.annotation import site_of
from qpc.ir.program import Program
from qpc.options import Options
from qpc.passes.canonicalize import Canonicalize
from qpc.passes.pipeline import Pipeline
from qpc.sensitivity import OutputMoments, by_gradient
from qpc.sensitivity_cache import Gradients, weighed
from tests.families import FAMILIES, tokens


class TwoSteps(torch.nn.Module):
    """A matrix behind another, with an output that is compared by its relative error."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.first, self.last = torch.nn.Linear(24, 16), torch.nn.Linear(16, 8, bias=False)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, generator=draw)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.first(x))
        return out


def two_steps() -> Program:
    program = capture(TwoSteps(), example_inputs=(torch.zeros(2, 24),))
    Pipeline((Canonicalize(),)).run(program)
    return program


def llama(**options: object) -> tuple[Program, Options]:
    found = Options.of(3, calibration=tokens(16, 12), **options)  # type: ignore[arg-type]
    program = captured(FAMILIES["llama"](), found)
    group(program, found)
    return program, found


def test_they_are_those_of_the_linears_behind() -> None:
    """The gradient of z . output with respect to the first output is W^T z, and z is white: its moment is proportional to W^T W."""
    program = two_steps()
    moments = OutputMoments.of(program)
    rows = torch.randn(4096, 24, generator=torch.Generator().manual_seed(1))
    by_gradient(program, torch.split(rows, 512), moments=moments, held_out=2)
    found = moments.moments()["first.weight"]
    last = program.module.last.weight.detach()  # type: ignore[union-attr]
    expected = last.T @ last
    assert found.count == 6 * 512 and found.held_out is not None and found.held_out.count == 2 * 512
    for each in (found.matrix, found.held_out.matrix):
        scale = float((each * expected).sum() / expected.square().sum())
        assert float((each - scale * expected).norm()) < 0.15 * float(each.norm())


def test_what_memory_does_not_suffice_for_is_said() -> None:
    program, _ = llama()
    everything, shapes = OutputMoments.of(program), {site_of(node).weight: site_of(node).shape.out_features for node in program.linears()}
    assert dict(everything.rows) == shapes and everything.declined is None
    widest = max(shapes.values())
    fewer = OutputMoments.of(program, sum(8 * rows**2 for rows in shapes.values()) - 1)
    assert len(fewer.rows) == len(shapes) - 1 and max(set(shapes.values()) - set()) == widest
    assert fewer.declined is not None and f"of 1 weights, of {widest} outputs" in fewer.declined


def test_a_compile_expects_less_and_leaves_less() -> None:
    """With rows coupled less error is expected and, by the judge of both sides, less is left, in the same bytes."""
    models = {}
    for switch in ("off", "on"):
        models[switch] = qpc.compile(
            FAMILIES["llama"](), 3, effort="fast", calibration=tokens(64, 24), tokenizer=None, row_feedback=switch, tune="off"
        )
    off, on = (qpc.report_of(models[switch]) for switch in ("off", "on"))
    assert on.linear_bytes == off.linear_bytes
    assert on.predicted_loss < off.predicted_loss


def test_gradients_are_taken_again_where_passes_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of a pass has no moments."""
    monkeypatch.setenv("QPC_CACHE", str(tmp_path))
    found = []
    for _ in range(2):
        program, options = llama(row_feedback="on")
        prepared = prepare(program, options, None)
        assert prepared.samples is not None and prepared.samples.outputs is not None
        found.append(prepared.samples.outputs)
    assert found[0].keys() == found[1].keys() == OutputMoments.of(program).rows.keys()
    assert all(torch.equal(found[0][name].matrix, found[1][name].matrix) for name in found[0])


def test_what_is_declined_is_a_remark() -> None:
    program, _ = llama()
    samples = Samples((tokens(4, 8),), (), "given")
    _, (remark,) = weighed(Gradients(program, samples, 0, moments=OutputMoments.of(program, 0)))
    assert "not carried between the rows" in remark.reason


def test_rows_are_coupled_by_default_on_a_gpu_alone() -> None:
    budget = Budget.of(3)
    devices = [torch.device("cpu"), torch.device("cuda")]
    assert [Options.of(budget).couples_rows(device) for device in devices] == [False, True]
    assert [Options.of(budget, row_feedback="on").couples_rows(device) for device in devices] == [True, True]
    assert [Options.of(budget, row_feedback="off").couples_rows(device) for device in devices] == [False, False]
    assert not Options(budget, row_feedback=True, weigh_positions=False).couples_rows(devices[1])
    assert Options(budget, calibration=Given((tokens(1, 2),))).row_feedback is None
    with pytest.raises(SettingsError, match="row_feedback='maybe' must be 'auto', 'on' or 'off'"):
        Options.of(budget, row_feedback="maybe")
