"""Error feedback: the algebra that it rests on, and what it is for."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from qpc.errors import QuantizerError
from qpc.quant.feedback import DEFAULT_DAMPING, Feedback, RowFeedback
from qpc.quant.layout import BLOCK_COLUMNS
from qpc.quant.moment import Moment
from qpc.quant.palette import Effort, trellis_at
from qpc.quant.quantizer import Quantizer
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


def test_only_the_rounding_errors_of_single_blocks_are_left() -> None:
    """(E L)_j = (target_j - made_j) L_jj for any rounding: the identity in the docstring of the module."""
    feedback = Feedback.of(moment(1000))
    unit = torch.zeros(64, 208)
    unit[:, :FEATURES] = weight(64)
    left: dict[int, Tensor] = {}

    def to_halves(index: int, target: Tensor) -> Tensor:
        made = (2 * target).round() / 2
        left[index] = target - made
        return made

    error = (unit - RowFeedback(((64, feedback),)).round(unit, to_halves))[:, :FEATURES].double()
    matrix = moment(1000).matrix.double()
    lower = torch.linalg.cholesky(matrix + DEFAULT_DAMPING * matrix.diagonal().mean() * torch.eye(FEATURES, dtype=torch.float64))
    for index, own in left.items():
        block = slice(index * BLOCK_COLUMNS, min((index + 1) * BLOCK_COLUMNS, FEATURES))
        width = block.stop - block.start
        assert torch.allclose((error @ lower)[:, block], own[:, :width].double() @ lower[block, block], rtol=1e-3, atol=2e-3)
    assert sorted(left) == list(range(13))


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


@pytest.mark.parametrize("matrix", [torch.zeros(3, 4), torch.zeros(4), torch.full((2, 2), torch.nan)])
def test_what_is_no_moment_is_refused(matrix: Tensor) -> None:
    with pytest.raises(QuantizerError, match="finite square matrix"):
        Feedback.of(Moment(matrix, 1))
