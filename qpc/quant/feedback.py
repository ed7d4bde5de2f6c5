"""Error feedback: block LDLQ, rounding in the metric of the inputs.

With H the second moment of the inputs, an error E of the weight costs tr(E H E^T). Let H = L L^T with L lower triangular, and cut both into
blocks of columns. Then E L has the blocks

    (E_j + sum over i > j of E_i B_ij) L_jj,    B_ij = L_ij L_jj^-1,

so if the blocks are rounded from the last to the first, each towards W_j + sum of E_i B_ij, only the rounding errors of single blocks are
left, weighed by L_jj. (LDLQ: QuIP, arXiv 2307.13304, section 3; in blocks: QuIP#, arXiv 2402.04396, section 4.)

Damping, H + d mean(diag H) I, is chosen by what would be left on samples that H has not seen. For rounding errors that are white, that
is tr(U^-1 H' U^-T) / tr(H') with U the unit lower triangular matrix of the blocks B and H' the moment of those samples.

Rows can be rounded in the same way, in the metric of the outputs: with G the second moment of the gradients with respect to what the linear
writes, tr(E H E^T G) is what E costs in the loss, to second order and as far as inputs and gradients are independent. Then an error is
carried into the columns and into the rows to come (`qpc.quant.rounding`). (Feedback on both sides: YAQA, arXiv 2505.22988.)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from qpc.errors import QuantizerError
from qpc.quant.layout import BLOCK_COLUMNS, BLOCK_ROWS
from qpc.quant.moment import Moment
from qpc.quant.triangle import Triangle

DEFAULT_DAMPING = 1e-2
"""Relative to the mean of the diagonal, where there are no held-out samples (the value of GPTQ, arXiv 2210.17323, section 3)."""

DAMPING_STEP = 10**0.5
"""With held-out samples the damping climbs or descends from there by such steps as long as they lose less."""

SLAB = 512
"""Columns that are worked on at a time, a multiple of every block, so that temporaries are small beside the matrices."""

DAMPING_RANGE = (1e-5, 10.0)
"""Where that ends in any case."""


@dataclass(frozen=True)
class Expected:
    """What is known of feedback without its matrices: the share of the error that it will leave, and its damping."""

    share: float
    damping: float


@dataclass(frozen=True)
class Feedback:
    """How the error of each block of columns is carried into those before it, and that of each block of rows if `outputs` says how.

    carry: float32 [columns, columns], columns a multiple of the block: B below the diagonal blocks, zero elsewhere.
    corners: float32 [columns / block, block, block]: the blocks L_jj.
    judge: float32 [in_features, in_features], the moment by which errors are judged: of held-out samples if there were any, else the one
        that was factored, before damping.
    damping: relative to the mean of the moment's diagonal.
    expected_share: the error that is left of white rounding errors, over the error without feedback; on held-out samples if there were any.
    outputs: the same of rows in blocks of 64, where every row has been divided by its root mean square; None: rows are independent.
    """

    carry: Tensor
    corners: Tensor
    judge: Tensor
    damping: float
    expected_share: float
    outputs: "Feedback | None" = None

    @staticmethod
    def of(moment: Moment, damping: float | None = None, block: int = BLOCK_COLUMNS) -> "Feedback":
        """Factor the second moment of a linear's inputs.

        moment: in the basis of the weight, of any rank. damping: by default the best for the held-out part of the moment, if it has one.
        block: columns that are rounded together. If this holds the only reference to the moment, about three matrices of its size in
        float32 are held at most.

        Raises `QuantizerError` if the moment is not square or not finite.
        """
        inputs, judge, damping = _halves(moment, damping)
        del moment  # its memory is needed for the factor
        unit, corners, damping, share = _unit_of(inputs, damping or _best_damping(inputs, judge, block)[0], judge, block)
        unit.diagonal().sub_(1)
        features, columns = len(inputs.kept), len(unit)
        inputs.put(unit[:features, :features])  # which waits there until the factor is dropped
        del unit
        carry = torch.zeros(columns, columns, device=corners.device).t()
        inputs.fill(carry[:features, :features])
        whole = torch.empty(features, features, device=corners.device)
        judge.fill(whole, symmetric=True)
        return Feedback(carry, corners.float(), whole, damping, share)

    @staticmethod
    def expected(moment: Moment) -> Expected:
        """What the feedback of a moment is expected to leave, without its matrices. Raises as `of` does."""
        inputs, judge, damping = _halves(moment, None)
        del moment
        found = _best_damping(inputs, judge, BLOCK_COLUMNS) if damping is None else _unit_of(inputs, damping, judge, BLOCK_COLUMNS)[2:]
        return Expected(share=found[1], damping=found[0])

    def and_of(self, gradients: Moment) -> "Feedback":
        """The same with feedback between rows.

        gradients: the second moment of the gradients with respect to the outputs, each of which is multiplied by the root mean square of
        its row of the weight (`row_deviations`).

        Raises `QuantizerError` if the moment is not square or not finite.
        """
        return replace(self, outputs=Feedback.of(gradients, block=BLOCK_ROWS))

    @property
    def share(self) -> float:
        """The error that is expected to be left of white rounding errors, by feedback between columns and rows."""
        return self.expected_share * (1.0 if self.outputs is None else self.outputs.expected_share)

    def whitened(self, rows: Tensor) -> Tensor:
        """Rows times L: what their errors cost is its square. rows: float32 [rows, in_features]. Returns [rows, columns]."""
        wide = functional.pad(rows, (0, len(self.carry) - rows.shape[1]))
        blocks = torch.addmm(wide, wide, self.carry).view(len(rows), *self.corners.shape[:2])
        return torch.bmm(blocks.transpose(0, 1), self.corners).transpose(0, 1).flatten(1)

    @property
    def damped(self) -> Tensor:
        """The moment that was factored, L L^T: float32 [in_features, in_features]."""
        lower = self.whitened(torch.eye(len(self.judge), device=self.judge.device))
        return lower @ lower.t()

    def share_left(self, weight: Tensor, made: Tensor, distortion: float) -> float:
        """tr(E H E^T G), E = weight - made, over what rounding without feedback is expected to leave, by the judges H and G.

        Where rows are independent G is the identity. Without feedback a row of E has `distortion` times the square of that of the weight.

        weight, made: float32 [out_features, in_features]. distortion: of the quantizer. 1 if there is nothing to lose.
        """
        mean = float(self.judge.diagonal().mean(dtype=torch.float64))
        if self.outputs is None:
            energy = float(weight.square().sum(dtype=torch.float64)) * mean  # of which nothing is left when the error is made
            error = weight - made
            left = float((error @ self.judge).mul_(error).sum(dtype=torch.float64))
        else:
            energy = float(self.outputs.judge.diagonal().sum(dtype=torch.float64)) * weight.shape[1] * mean
            error = weight - made
            felt, deviations = error @ self.judge, row_deviations(weight).to(error)
            error = error / torch.where(deviations > 0, deviations, 1)[:, None]
            felt = felt / torch.where(deviations > 0, deviations, 1)[:, None]
            left = float(((self.outputs.judge @ felt) * error).sum(dtype=torch.float64))
        return left / (distortion * energy) if energy > 0 else 1.0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        own = self.carry.nbytes + self.corners.nbytes + self.judge.nbytes
        return own + (0 if self.outputs is None else self.outputs.nbytes)


def row_deviations(weight: Tensor) -> Tensor:
    """The root mean square of each row: float64 [out_features]."""
    lengths: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64)
    return lengths / math.sqrt(weight.shape[1])


@dataclass(frozen=True)
class StackFeedback:
    """The feedback of a stack of experts, whose rows lie below each other: one of each, counted by the inputs that it read.

    parts: of each expert. counts: inputs that it read.
    """

    parts: tuple[Feedback, ...]
    counts: tuple[int, ...]

    @staticmethod
    def of(moments: Sequence[Moment]) -> "StackFeedback":
        """Factor the moment of each expert, as `Feedback.of` does. Raises as it does."""
        return StackFeedback(tuple(Feedback.of(moment) for moment in moments), tuple(moment.count for moment in moments))

    @property
    def expected_share(self) -> float:
        """That of all experts together, of rows of one size."""
        weights = [count * float(part.judge.diagonal().sum()) for part, count in zip(self.parts, self.counts, strict=True)]
        total = sum(weights)
        return sum(w * part.expected_share for w, part in zip(weights, self.parts, strict=True)) / total if total > 0 else 1.0

    @property
    def share(self) -> float:
        """The same: rows of experts are independent."""
        return self.expected_share

    @property
    def damping(self) -> float:
        """The mean of those of the experts."""
        return sum(part.damping for part in self.parts) / len(self.parts)

    def share_left(self, weight: Tensor, made: Tensor, distortion: float) -> float:
        """As `Feedback.share_left`, of the error of all inputs of all experts."""
        left = total = 0.0
        pairs = zip(weight.chunk(len(self.parts)), made.chunk(len(self.parts)), strict=True)
        for part, count, (before, after) in zip(self.parts, self.counts, pairs, strict=True):
            expected = distortion * float(before.square().sum(dtype=torch.float64)) * float(part.judge.diagonal().mean(dtype=torch.float64))
            left += count * expected * part.share_left(before, after, distortion)
            total += count * expected
        return left / total if total > 0 else 1.0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in self.parts)


def _halves(moment: Moment, damping: float | None) -> tuple[Triangle, Triangle, float | None]:
    """The moment to factor, that to judge by, and the damping, if it is not to be found out. Raises `QuantizerError`."""
    matrix = moment.matrix
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not all(bool(rows.isfinite().all()) for rows in torch.split(matrix, SLAB)):
        raise QuantizerError(f"a moment must be a finite square matrix, got {tuple(matrix.shape)}")
    if not bool(matrix.diagonal().sum(dtype=torch.float64) > 0):  # inputs that are always zero: nothing to weigh by
        matrix = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    judge = None if moment.held_out is None else moment.held_out.matrix
    if judge is None or not bool(judge.diagonal().sum(dtype=torch.float64) > 0):
        judge, damping = matrix, damping or DEFAULT_DAMPING
    halves = Triangle.pair(len(matrix), torch.promote_types(matrix.dtype, judge.dtype), matrix.device)
    for half, values in zip(halves, (matrix, judge), strict=True):
        half.put(values)
    return *halves, damping


def _best_damping(inputs: Triangle, judge: Triangle, block: int) -> tuple[float, float]:
    """The damping with which the least is left by the judge, on a climb or else a descent from the default by steps, and that share."""
    best, least = _unit_of(inputs, DEFAULT_DAMPING, judge, block)[2:]
    for step in (DAMPING_STEP, 1 / DAMPING_STEP):
        start = best
        while DAMPING_RANGE[0] < best * step < DAMPING_RANGE[1]:
            other, share = _unit_of(inputs, best * step, judge, block)[2:]
            if share >= least or (other < best) != (step < 1):
                break
            best, least = other, share
        if best > start:  # what lies behind is known
            break
    return best, least


def _unit_of(inputs: Triangle, damping: float, judge: Triangle, block: int) -> tuple[Tensor, Tensor, float, float]:
    """The unit lower triangular factor, float64 [columns, columns]; the blocks L_jj; the damping, raised tenfold as long as the damped
    moment cannot be factored; and the share of white errors that the factor leaves.

    The factor is the only matrix of that size in float64: all steps are in its place, or go slab by slab.
    """
    lower, damping = _lower(inputs, damping, block)
    corners = []
    for start in range(0, len(lower), SLAB):
        panel = lower[start:, start : start + SLAB]
        count = panel.shape[1] // block
        corners.append(panel[: count * block].view(count, block, count, block).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone())
        square = torch.block_diag(*corners[-1])  # type: ignore[no-untyped-call]
        panel.copy_(torch.linalg.solve_triangular(square, panel, upper=False, left=False))
    return lower, torch.cat(corners), damping, _share_left(lower, judge)


def _lower(inputs: Triangle, damping: float, block: int) -> tuple[Tensor, float]:
    """The Cholesky factor of the damped moment in float64, with an identity below that fills the last block, and the damping.

    It lies column by column, as LAPACK wants it, or there would be a copy.
    """
    device, features = inputs.kept.device, len(inputs.kept)
    failed, mean = torch.empty((), dtype=torch.int32, device=device), inputs.diagonal.mean()
    while True:
        lower = torch.eye(-(-features // block) * block, dtype=torch.float64, device=device).t()
        inputs.fill(lower[:features, :features])
        lower.diagonal()[:features] += damping * mean
        torch.linalg.cholesky_ex(lower, out=(lower, failed))  # which looks at nothing above the diagonal
        if not failed:
            return lower, damping
        damping *= 10


def _share_left(unit: Tensor, judge: Triangle) -> float:
    """tr(U^-1 H' U^-T) / tr(H'), U being `unit`: the sum of r H' r^T over the rows r of U^-1, which are made slab by slab, ends first."""
    features, left = len(judge.kept), torch.zeros((), dtype=torch.float64, device=unit.device)
    for start in range(0, features, SLAB):
        stop = min(start + SLAB, features)
        rows = torch.zeros(stop - start, stop, dtype=torch.float64, device=unit.device)
        rows[:, start:].fill_diagonal_(1)
        for first in range(start, -1, -SLAB):
            last = min(first + SLAB, stop)
            part, corner = rows[:, first:last], unit[first:last, first:last]
            part -= rows[:, last:] @ unit[last:stop, first:last]
            part.copy_(torch.linalg.solve_triangular(corner, part, upper=False, left=False))
            metric = judge.symmetric(slice(first, stop), slice(first, last))
            metric[last - first :] *= 2  # what is above the diagonal is the same
            left += (rows[:, first:] @ metric * part).sum()
    return float(left / judge.diagonal.sum())
