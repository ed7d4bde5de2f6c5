"""Error feedback: the algebra that it rests on, and what it is for."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qpc.errors import QuantizerError
from qpc.quant.feedback import Expected, Feedback, row_deviations
from qpc.quant.moment import Moment
from qpc.quant.palette import Effort, trellis_at
from qpc.quant.quantizer import Quantizer
from qpc.quant.rounding import RowFeedback
from qpc.quant.scalar import ScalarQuantizer
from qpc.quant.stacking import quantize_stacked
from qpc.quant.vector import VectorQuantizer

FEATURES = 200
QUANTIZERS = [
    pytest.param(trellis_at(Fraction(3), Effort.FAST), id="trellis"),
    pytest.param(trellis_at(Fraction(9, 4), Effort.FAST), id="mixed"),
    pytest.param(ScalarQuantizer(3), id="scalar"),
    pytest.param(VectorQuantizer(2, 6), id="vector"),
]


def inputs(count: int, seed: int = 0, features: int = FEATURES) -> Tensor:
    """Correlated inputs of very different sizes: float32 [count, features]. The seed draws the inputs, not their distribution."""
    mixing = torch.randn(features, features, generator=torch.Generator().manual_seed(99)) * torch.linspace(0.3, 2, features)
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed)) @ mixing


def moment(count: int, seed: int = 0, held_out: int = 0, features: int = FEATURES) -> Moment:
    x = inputs(count, seed, features)
    rest = moment(held_out, seed + 1, features=features) if held_out else None
    return Moment(x.T @ x / count, count, rest)


def weight(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(seed))


def gradients(count: int, features: int, seed: int = 50) -> Tensor:
    """Of outputs a few directions of which matter more than the others: float32 [count, features]."""
    mixing = torch.randn(features, features // 4, generator=torch.Generator().manual_seed(98)) * (8 / features) ** 0.5
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, features, generator=draw) + torch.randn(count, features // 4, generator=draw) @ mixing.T


def output_moment(features: int, count: int = 2000) -> Moment:
    g, rest = gradients(count, features), gradients(500, features, seed=51)
    return Moment(g.T @ g / count, count, Moment(rest.T @ rest / 500, 500))


def felt(moment: Moment, weight: Tensor) -> Moment:
    """As rows of unit deviation feel it."""
    return moment.scaled(row_deviations(weight))


@pytest.mark.parametrize("rows", [128, 200])
@pytest.mark.parametrize("coupled", [False, True])
def test_only_the_rounding_errors_of_single_blocks_are_left(coupled: bool, rows: int) -> None:
    """(V^T E U)_ab = target_ab - made_ab for any rounding: the identity in the docstring of the module."""
    feedback = Feedback.of(moment(1000))
    if coupled:
        feedback = feedback.and_of(felt(output_moment(rows), weight(rows)))
    unit = torch.zeros(-(-rows // 64) * 64, 208)
    unit[:rows, :FEATURES] = weight(rows)
    own = torch.full_like(unit, torch.nan)

    def to_halves(block_rows: Tensor, columns: Tensor, targets: Tensor) -> Tensor:
        made = (2 * targets).round() / 2
        for row, column, left in zip(block_rows.tolist(), columns.tolist(), targets - made, strict=True):
            own[64 * row : 64 * (row + 1), 16 * column : 16 * (column + 1)] = left
        return made

    error = (unit - RowFeedback(((rows, feedback),)).round(unit, to_halves)).double()
    left = error @ (feedback.carry.double() + torch.eye(208))
    if feedback.outputs is not None:
        left = (feedback.outputs.carry.double() + torch.eye(len(unit))).t() @ left
    assert torch.allclose(left, own.double(), rtol=1e-4, atol=1e-4)


def test_the_factors_are_those_of_the_damped_moment() -> None:
    """U D U^T of blocks: with U^-1 on both sides only the blocks of the diagonal are left."""
    for block in (16, 64):
        feedback = Feedback.of(moment(1000, features=192), block=block)
        inverse = torch.linalg.inv(feedback.carry.double() + torch.eye(192))
        left = inverse @ feedback.damped.double() @ inverse.t()
        blocks = torch.arange(192) // block
        assert float(left[blocks[:, None] != blocks].abs().max()) < 1e-4 * float(left.diagonal().mean())


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_feedback_between_rows_lowers_the_loss_further(quantizer: Quantizer) -> None:
    """tr(E H E^T G) of moments that were not seen, and what is said to be left of it."""
    w, unseen, judge = weight(192), gradients(500, FEATURES, seed=53), gradients(500, 192, seed=52)
    w *= torch.linspace(0.3, 2, 192)[:, None]
    one = Feedback.of(output_moment(FEATURES))
    both = one.and_of(felt(output_moment(192), w))
    made = [quantize_stacked(quantizer, [w], None, [each])[0] for each in (one, both)]
    losses = [float((judge @ (w - each.rotated()) @ unseen.T).square().sum()) for each in made]
    assert losses[1] < 0.9 * losses[0]
    assert both.share < 0.95 * one.share
    assert both.share_left(w, made[1].rotated(), quantizer.distortion) == pytest.approx(both.share, rel=0.15)
    assert made[0].nbytes == made[1].nbytes


def test_outputs_that_matter_alike_couple_no_rows() -> None:
    w, one = weight(130), Feedback.of(moment(1000))
    both = one.and_of(felt(Moment(torch.diag(row_deviations(w) ** -2), 1000), w))
    quantizer = trellis_at(Fraction(3), Effort.FAST)
    plain, fed = (quantize_stacked(quantizer, [w], None, [each])[0] for each in (one, both))
    assert torch.equal(plain.codes[0], fed.codes[0])
    assert torch.allclose(plain.scales.float(), fed.scales.float(), rtol=1e-2)
    assert both.share == pytest.approx(one.share)


def test_scales_are_the_best_for_rows_together() -> None:
    w, made = weight(100), weight(100) + 0.3 * weight(100, seed=1)
    feedback = Feedback.of(moment(1000)).and_of(felt(output_moment(100), w))
    assert feedback.outputs is not None
    unit = torch.cat([w, torch.zeros(28, FEATURES)])
    rough = torch.cat([made, torch.ones(28, FEATURES)])
    scales = RowFeedback(((100, feedback),)).best_scales(unit, rough)
    assert torch.equal(scales[100:], torch.zeros(28, dtype=torch.float64))

    def loss(each: Tensor) -> float:
        assert feedback.outputs is not None
        error = w.double() - each[:, None] * made.double()
        return float((error @ feedback.damped.double() @ error.T * feedback.outputs.damped.double()).sum())

    for row in (0, 50, 99):
        for change in (0.99, 1.01):
            other = scales[:100].clone()
            other[row] *= change
            assert loss(other) > loss(scales[:100])


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_feedback_lowers_the_error_of_the_output(quantizer: Quantizer) -> None:
    feedback = Feedback.of(moment(4000, held_out=500))
    w, unseen = weight(96), inputs(500, seed=7)
    plain, fed = quantize_stacked(quantizer, [w])[0], quantize_stacked(quantizer, [w], None, [feedback])[0]
    errors = [float(((w - each.rotated()) @ unseen.T).square().sum()) for each in (plain, fed)]
    assert errors[1] < 0.65 * errors[0]
    assert fed.nbytes == plain.nbytes
    assert feedback.share_left(w, fed.rotated(), quantizer.distortion) < 0.65


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_white_inputs_leave_nothing_to_feed_back(quantizer: Quantizer) -> None:
    feedback = Feedback.of(Moment(3.0 * torch.eye(FEATURES), 1000))
    w = weight(70)
    plain, fed = quantize_stacked(quantizer, [w])[0], quantize_stacked(quantizer, [w], None, [feedback])[0]
    assert all(torch.equal(a, b) for a, b in zip(plain.codes, fed.codes, strict=True))
    assert torch.equal(plain.scales, fed.scales)
    assert feedback.expected_share == pytest.approx(1)


def test_weights_are_rounded_together_as_each_by_itself() -> None:
    weights = [weight(rows, rows) for rows in (130, 64, 70)]
    feedbacks = [Feedback.of(moment(1000, seed)) for seed in range(3)]
    feedbacks[0] = feedbacks[0].and_of(felt(output_moment(130), weights[0]))
    feedbacks[2] = feedbacks[2].and_of(felt(output_moment(70), weights[2]))
    quantizer = trellis_at(Fraction(3), Effort.FAST)
    together = quantize_stacked(quantizer, weights, None, feedbacks)
    for w, feedback, packed in zip(weights, feedbacks, together, strict=True):
        alone = quantize_stacked(quantizer, [w], None, [feedback])[0]
        assert torch.equal(alone.codes[0], packed.codes[0]) and torch.equal(alone.scales, packed.scales)
        assert packed.out_features == len(w)


@pytest.mark.parametrize("matrix", [torch.zeros(48, 48), torch.ones(48, 48), torch.diag(torch.tensor([1e20] + [0.0] * 47))])
def test_singular_moments_do_no_harm(matrix: Tensor) -> None:
    for held_out in (None, Moment(matrix, 10)):
        feedback = Feedback.of(Moment(matrix, 10, held_out))
        assert feedback.carry.isfinite().all() and feedback.damping > 0
        packed = quantize_stacked(ScalarQuantizer(4), [torch.randn(64, 48)], None, [feedback])[0]
        assert packed.rotated().isfinite().all()


def test_fewer_samples_earn_more_damping() -> None:
    """The damping is chosen by inputs that the moment has not seen, and does better on third ones than too little of it."""
    few, many = (Feedback.of(moment(count, held_out=400)) for count in (100, 8000))
    assert few.damping > 3 * many.damping
    assert many.expected_share < few.expected_share < 1


def test_slabs_cut_a_weight_as_if_it_were_alone_and_never_where_rows_are_coupled() -> None:
    one = Feedback.of(moment(1000))
    parts = RowFeedback(((192, one), (320, one.and_of(felt(output_moment(320), weight(320)))), (64, one), (70, one)))
    slabs = list(parts.slabs(128))
    assert [(each.start, each.stop) for each in slabs] == [(0, 128), (128, 192), (192, 512), (512, 576), (576, 646)]
    assert [[height for height, _ in parts.of_rows(each).parts] for each in slabs] == [[128], [64], [320], [64], [70]]


@pytest.mark.parametrize("matrix", [torch.zeros(3, 4), torch.zeros(4), torch.full((2, 2), torch.nan)])
def test_what_is_no_moment_is_refused(matrix: Tensor) -> None:
    with pytest.raises(QuantizerError, match="finite square matrix"):
        Feedback.of(Moment(matrix, 1))


@pytest.mark.parametrize("features", [200, 192])
def test_slabs_are_only_a_way_to_need_little_memory(features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same factor whether it is made at once or slab by slab, and the share of the definition, tr(U^-1 H' U^-T) / tr(H')."""
    given = moment(1000, held_out=300, features=features)
    whole = Feedback.of(given)
    monkeypatch.setattr("qpc.quant.feedback.SLAB", 64)
    monkeypatch.setattr("qpc.quant.triangle.SLAB", 64)
    cut = Feedback.of(given)
    assert cut.damping == whole.damping
    torch.testing.assert_close(cut.carry, whole.carry, rtol=1e-6, atol=1e-6)
    unit = (whole.carry.double() + torch.eye(len(whole.carry), dtype=torch.float64))[:features, :features]
    inverse = torch.linalg.inv(unit)
    expected = float((inverse @ whole.judge.double() * inverse).sum() / whole.judge.double().trace())
    assert cut.expected_share == pytest.approx(expected, rel=1e-5) and whole.expected_share == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("held_out", [0, 300])
def test_what_is_expected_needs_no_matrices(held_out: int) -> None:
    made = Feedback.of(moment(1000, held_out=held_out))
    assert Feedback.expected(moment(1000, held_out=held_out)) == Expected(made.expected_share, made.damping)


def test_moments_in_double_precision_are_factored_alike_and_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qpc.quant.feedback.SLAB", 64)
    single, double = moment(1000, held_out=300), moment(1000, held_out=300)
    assert double.held_out is not None
    wide = Moment(double.matrix.double(), 1000, Moment(double.held_out.matrix.double(), 300))
    found, expected = Feedback.of(wide), Feedback.of(single)
    assert torch.equal(found.carry, expected.carry) and found.expected_share == expected.expected_share
    assert wide.held_out is not None and torch.equal(wide.held_out.matrix, double.held_out.matrix.double())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux says what was held at most")
def test_three_matrices_are_held_at_most() -> None:
    """Two moments, one of them in float64 as it is factored, and the feedback; slabs and what LAPACK takes come on top."""
    command = [sys.executable, "-m", "tests.quant.feedback_memory"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert 2 < float(found.stdout) < 4.2
