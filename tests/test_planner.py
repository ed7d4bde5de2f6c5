"""Plans: the curve falls, every point keeps its budget, and a compile with the same sensitivities allocates what was planned."""

import json
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qpc
from qpc.budget import Budget
from qpc.calibration import SelfSampled
from qpc.errors import BudgetError, ModelError, ProfileError, QpcError, UsageError
from qpc.integrations.matplotlib import check_picture, draw_plan
from qpc.latency import Roofline
from qpc.plan_report import mixture, notes
from qpc.planner import Plan, Use
from qpc.report import Report
from qpc.sensitivity import Loss, Method, Sensitivities
from tests.families import FAMILIES

TOY_GPU = Roofline("toy", read_bytes_per_s=10**9, launch_ps=1_000_000)
RATES = [Fraction(quarter, 4) for quarter in range(8, 20, 2)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return FAMILIES["llama"]().eval()


@pytest.fixture(scope="module")
def felt(model: nn.Module) -> Sensitivities:
    """Values that differ much, for every linear of the layers."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    draw = torch.randn(len(names), generator=torch.Generator().manual_seed(0))
    return Sensitivities({name: float(value.exp()) for name, value in zip(names, draw, strict=True)}, Loss.KL, 0.02, 0, 192)


@pytest.fixture(scope="module")
def curve(model: nn.Module, felt: Sensitivities) -> Plan:
    return qpc.plan(model, RATES, effort="fast", calibration=None, sensitivities=felt)


def test_the_curve_falls_and_every_point_keeps_its_budget(curve: Plan) -> None:
    assert [point.budget for point in curve.points] == [str(Budget.of(rate)) for rate in RATES]
    for rate, point in zip(RATES, curve.points, strict=True):
        assert Fraction(8 * point.weight_bytes, curve.weights) <= rate
        assert point.model_bytes == point.weight_bytes + curve.other_bytes < curve.model_bytes_before
        assert sum(use.weights for use in point.uses) == curve.weights
        assert point.solver_gap <= 1e-6
    for before, after in pairwise(curve.points):
        assert before.predicted_loss > after.predicted_loss
        assert before.model_bytes <= after.model_bytes


def test_no_point_beats_the_bound_and_no_single_quantizer_beats_a_point(curve: Plan, model: nn.Module, felt: Sensitivities) -> None:
    for point in (*curve.points, *curve.singles):
        assert point.predicted_loss > point.bound > 0
        assert point.decibels is not None and point.decibels > 0
    some = [single for single in curve.singles if 2 < single.bits_per_weight < 5]
    assert len(some) > 4
    same_size = qpc.plan(model, [f"{single.model_bytes}B" for single in some], effort="fast", calibration=None, sensitivities=felt)
    for single, point in zip(some, same_size.points, strict=True):
        assert point.predicted_loss <= single.predicted_loss * (1 + 1e-6)


@pytest.mark.parametrize("budget", ["3.25", "2.5nats", "120kB", "4bit, 1.5nats", "0.11ms", "3.25bit, 0.11ms@2"])
def test_a_compile_allocates_what_was_planned(model: nn.Module, felt: Sensitivities, budget: str) -> None:
    gpu = TOY_GPU if "ms" in budget else None
    planned = qpc.plan(model, [budget], effort="fast", calibration=None, sensitivities=felt, gpu=gpu)
    made = qpc.report_of(qpc.compile(model, budget, effort="fast", calibration=None, sensitivities=felt, gpu=gpu))
    assert planned.report is not None
    (point,) = planned.points

    def decided(report: Report) -> list[tuple[object, ...]]:
        return [(row.name, row.quantizer, row.weight_bytes, row.group, row.sensitivity) for row in report.rows]

    assert decided(planned.report) == decided(made)
    assert point.model_bytes == planned.report.model_bytes == made.model_bytes
    assert planned.model_bytes_before == made.model_bytes_before
    assert planned.report.predicted_loss == pytest.approx(point.predicted_loss)
    assert made.predicted_loss == pytest.approx(point.predicted_loss, rel=0.3), "the tiny weights are not quite Gaussian"
    assert planned.report.calibration is None and planned.report.solver_gap == made.solver_gap


def test_a_folded_model_is_planned_to_the_byte(model: nn.Module, felt: Sensitivities) -> None:
    (point,) = qpc.plan(model, [4], effort="fast", calibration=None, sensitivities=felt, fold=True).points
    made = qpc.report_of(qpc.compile(model, 4, effort="fast", calibration=None, sensitivities=felt, fold=True))
    assert (point.model_bytes, point.weight_bytes) == (made.model_bytes, made.linear_bytes)


def test_a_plan_knows_what_feedback_will_leave(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPC_CACHE", str(tmp_path))
    options: dict[str, Any] = {"effort": "fast", "calibration": SelfSampled(tokens=2048, length=32)}
    steps: list[str] = []
    plan = qpc.plan(model, [3], **options, progress=lambda task, done, total: steps.append(task))
    assert {"gradients", "calibrate", "linearity"} <= set(steps)
    steps.clear()
    assert plan == qpc.plan(model, [3], **options, progress=lambda task, done, total: steps.append(task))
    assert not steps, "the second plan measures nothing"
    made = qpc.report_of(qpc.compile(model, 3, **options))
    assert plan.report is not None and plan.linearity is not None and plan.sensitivity is Method.GRADIENT
    assert [(row.name, row.quantizer) for row in plan.report.rows] == [(row.name, row.quantizer) for row in made.rows]
    without = qpc.plan(model, [3], effort="fast", calibration=None)
    assert plan.points[0].predicted_loss < without.points[0].predicted_loss
    assert made.predicted_loss == pytest.approx(plan.points[0].predicted_loss, rel=0.3)
    assert "self-sampled" in next(notes(plan)) and "without" in next(notes(without))


def test_embeddings_count_with_their_packed_size(model: nn.Module, felt: Sensitivities) -> None:
    plain, packed = (qpc.plan(model, [3], effort="fast", calibration=None, sensitivities=felt, embeddings=bits) for bits in (None, 4))
    made = qpc.report_of(qpc.compile(model, 3, effort="fast", calibration=None, sensitivities=felt, embeddings=4))
    assert packed.points[0].model_bytes == made.model_bytes < plain.points[0].model_bytes
    assert packed.points[0].weight_bytes == plain.points[0].weight_bytes


def test_a_smaller_loss_takes_a_larger_model(model: nn.Module, felt: Sensitivities) -> None:
    limits = [Fraction(1, 1), Fraction(1, 3), Fraction(1, 10)]
    points = qpc.plan(model, [Budget(kl_nats=limit) for limit in limits], effort="fast", calibration=None, sensitivities=felt).points
    for limit, point in zip(limits, points, strict=True):
        assert 0.8 * limit < point.predicted_loss <= limit
    assert points[0].model_bytes < points[1].model_bytes < points[2].model_bytes


def test_a_gpu_adds_times_and_leaves_the_sizes(curve: Plan, model: nn.Module, felt: Sensitivities) -> None:
    timed = qpc.plan(model, RATES, effort="fast", calibration=None, sensitivities=felt, gpu=TOY_GPU, batch=4)
    assert (timed.gpu, curve.gpu) == ("toy, roofline", None)
    for before, point in zip(curve.points, timed.points, strict=True):
        assert before.latency_s is None and before.batch is None
        assert point.latency_s is not None and point.batch == 4
        assert point.predicted_loss == pytest.approx(before.predicted_loss, rel=1e-5)
    for before, after in pairwise(timed.points):
        assert before.latency_s is not None and after.latency_s is not None and before.latency_s < after.latency_s
    floor = min(point.latency_s or 0.0 for point in timed.points)
    assert all(single.latency_s is not None and single.latency_s > 0.5 * floor for single in timed.singles)
    assert [single.predicted_loss for single in timed.singles] == pytest.approx([single.predicted_loss for single in curve.singles])


def test_a_longer_time_takes_less_loss_and_each_is_kept(model: nn.Module, felt: Sensitivities) -> None:
    budgets = ["0.1ms", "0.11ms", "0.12ms", "0.13ms"]
    points = qpc.plan(model, budgets, effort="fast", calibration=None, sensitivities=felt, gpu=TOY_GPU).points
    for budget, point in zip(budgets, points, strict=True):
        assert point.latency_s is not None and point.latency_s <= float(budget.removesuffix("ms")) / 1000 * (1 + 1e-12)
    for before, after in pairwise(points):
        assert before.predicted_loss > after.predicted_loss
    single = qpc.plan(model, [budgets[1]], effort="fast", calibration=None, sensitivities=felt, gpu=TOY_GPU)
    assert single.report is not None
    assert (single.report.gpu, single.report.batch, single.report.latency_s) == (single.gpu, 1, single.points[0].latency_s)
    assert any("roofline of toy" in remark for remark in single.report.remarks)


def test_a_time_without_a_gpu_says_what_to_do(model: nn.Module, felt: Sensitivities) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ProfileError, match="name one"):
        qpc.plan(model, ["1ms"], effort="fast", calibration=None, sensitivities=felt)


def test_the_model_is_left_as_it_is(felt: Sensitivities) -> None:
    model = FAMILIES["llama"]().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    qpc.plan(model, [3], effort="fast", calibration=None, sensitivities=felt, embeddings=4)
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(value, after[name]) for name, value in before.items())


def test_what_cannot_be_planned(model: nn.Module, felt: Sensitivities) -> None:
    for budgets, options, error, words in (
        ([], {}, BudgetError, "one budget or more"),
        ([3, 0.5], {}, BudgetError, "smallest feasible"),
        ([3], {"exclude": ["*"]}, ModelError, "no linear layers"),
        ([3], {"effort": "heroic"}, QpcError, "heroic"),
        ([3], {"sensitivities": Sensitivities({}, Loss.KL, 0.02, 0, 1)}, ModelError, "no value for"),
    ):
        with pytest.raises(error, match=words):
            qpc.plan(model, budgets, **{"effort": "fast", "calibration": None, "sensitivities": felt} | options)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_picture_is_drawn(curve: Plan, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"curve{suffix}"
    check_picture(path)
    draw_plan(curve, path, "tiny")
    assert path.stat().st_size > 5000


def test_a_picture_of_times_is_drawn_beside(curve: Plan, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    timed = [replace(point, latency_s=1e-3 * point.bits_per_weight, batch=8) for point in curve.points]
    draw_plan(curve, tmp_path / "sizes.svg", "tiny")
    draw_plan(replace(curve, points=tuple(timed), gpu="toy, roofline"), tmp_path / "both.svg", "tiny")
    sizes, both = ((tmp_path / f"{name}.svg").read_text() for name in ("sizes", "both"))
    assert both.count('id="axes_') == sizes.count('id="axes_') + 1


def test_where_no_picture_can_be_drawn(curve: Plan, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for path in (tmp_path / "curve.bmp", tmp_path / "none" / "curve.png"):
        with pytest.raises(UsageError, match=r"curve\.bmp|none"):
            check_picture(path)
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        draw_plan(curve, tmp_path / "taken.png", "tiny")


def test_a_plan_is_json(curve: Plan) -> None:
    value = json.loads(json.dumps(curve.to_json(), allow_nan=False))
    assert [point["budget"] for point in value["points"]] == [point.budget for point in curve.points]
    assert (value["loss"], value["effort"], value["report"]) == ("kl", "fast", None)


def test_mixtures_in_words() -> None:
    low, high, kept = Use("a", 2.25, 3, 30), Use("b", 4.0, 1, 50), Use(None, None, 2, 20)
    assert mixture((low, high)) == "2.25 to 4, mostly 4 (62%)"
    assert mixture((low, high, kept)) == "2.25 to 4, mostly 4 (50%); 2 as they are"
    assert mixture((low,)) == "2.25"
    assert mixture((kept,)) == "2 as they are"
