"""Rounding of stacked weights block by block, each error carried into the blocks that are still to come.

Columns go from the last to the first, rows too where they are coupled. With V and U the unit lower triangular matrices that outputs and
inputs were factored into (`qpc.quant.feedback`), what a block costs at the end is its part of V^T E U. Let F be E (U - I), which is known
of a block once the columns after it are rounded, and Z = E + F = E U; then

    (V^T E U)_ab = E_ab + F_ab + sum over rows a' > a of V_a'a^T Z_a'b,

so block ab is rounded towards its values plus the last two terms, and only its own rounding error is left. It must wait for the blocks
after it in its row and in its column, so those on an antidiagonal are rounded together: a *wave*. Where rows are independent, a wave is a
column. Waves of all weights go side by side, which keeps a parallel encoder busy.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qpc.quant.feedback import Feedback
from qpc.quant.layout import BLOCK_COLUMNS, BLOCK_ROWS

RoundBlocks = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`round_blocks(rows [blocks], columns [blocks], targets [blocks, 64, 16]) -> made`: numbers of block rows and columns, on the CPU."""


@dataclass(frozen=True)
class RowFeedback:
    """The feedback of each of several weights whose rows are stacked, so that they are rounded together.

    parts: rows of each, a multiple of 64 but for the last, and its feedback; all of one width.
    """

    parts: tuple[tuple[int, Feedback], ...]

    def of_rows(self, rows: slice) -> "RowFeedback":
        """The feedback of some of the rows. Weights whose rows are coupled must not be cut."""
        kept, start = [], 0
        for height, feedback in self.parts:
            overlap = min(start + height, rows.stop) - max(start, rows.start)
            if overlap > 0:
                assert overlap == height or feedback.outputs is None, "coupled rows are rounded together"
                kept.append((overlap, feedback))
            start += height
        return RowFeedback(tuple(kept))

    def slabs(self, most_rows: int) -> Iterator[slice]:
        """Ranges of at most so many rows, a multiple of 64, or of as many as the next coupled weight has if those are more.

        A weight is cut only if it is larger by itself, and always at the same rows: sums are then those that it would have alone.
        """
        ends, start = [], 0
        for height, feedback in self.parts:
            steps = range(start + most_rows, start + height, most_rows) if feedback.outputs is None else ()
            ends += [*steps, start + height]
            start += height
        begin = 0
        for end, following in zip(ends, [*ends[1:], None], strict=True):
            if following is None or following - begin > most_rows:
                yield slice(begin, end)
                begin = end

    def round(self, unit: Tensor, round_blocks: RoundBlocks) -> Tensor:
        """Round a matrix [rows, columns] of whole blocks, wave by wave."""
        strips = [_Strip(unit[rows], feedback, rows.start // BLOCK_ROWS) for rows, feedback in self._stacked(len(unit))]
        for wave in range(max(strip.waves for strip in strips)):
            active = [strip for strip in strips if strip.begin(wave)]
            rows, columns, targets = zip(*(strip.targets() for strip in active), strict=True)
            made = round_blocks(torch.cat(rows), torch.cat(columns), torch.cat(targets))
            for strip, part in zip(active, torch.split(made, [len(each) for each in rows]), strict=True):
                strip.take(part)
        return torch.cat([strip.made.flatten(2).flatten(0, 1) for strip in strips])

    def best_scales(self, unit: Tensor, made: Tensor) -> Tensor:
        """The scale of each row that fits `made` to `unit` best in the damped metrics: float64 [rows]; 0 for rows that were made 0.

        unit, made: float32 [rows, in_features].
        """
        return torch.cat([_best_scales(unit[rows], made[rows], feedback) for rows, feedback in self._stacked(len(unit))])

    def _stacked(self, total: int) -> Iterator[tuple[slice, Feedback]]:
        """The rows of each part; those that pad the matrix go with the last."""
        start = 0
        for number, (height, feedback) in enumerate(self.parts, start=1):
            stop = total if number == len(self.parts) else start + height
            yield slice(start, stop), feedback
            start = stop


@dataclass(eq=False)
class _Strip:
    """One weight on its way. A *step* is the number of a block column from the last; first: block rows of the weights above it."""

    unit: Tensor
    feedback: Feedback
    first: int
    rows: slice = field(init=False)
    steps: slice = field(init=False)

    def __post_init__(self) -> None:
        height, width = len(self.unit) // BLOCK_ROWS, self.unit.shape[1] // BLOCK_COLUMNS
        self.blocks = self.unit.view(height, BLOCK_ROWS, width, BLOCK_COLUMNS)
        self.made = torch.empty_like(self.blocks)
        self.error = torch.zeros_like(self.blocks)
        self.carry, outputs = self.feedback.carry, self.feedback.outputs
        self.row_carry = self.around = None
        if outputs is not None:
            self.carry = self.carry.t().reshape(width, BLOCK_COLUMNS, -1).flip(0).transpose(1, 2).contiguous()  # in the order of steps
            self.row_carry = outputs.carry.t().reshape(height, BLOCK_ROWS, -1)
            self.around = torch.zeros(width, height, BLOCK_ROWS, BLOCK_COLUMNS).to(self.unit)

    @property
    def waves(self) -> int:
        """How many there are."""
        height, _, width, _ = self.blocks.shape
        return width if self.row_carry is None else height + width - 1

    def begin(self, wave: int) -> bool:
        """Turn to the blocks of a wave; false if there are none."""
        height, _, width, _ = self.blocks.shape
        if self.row_carry is None:
            self.rows, self.steps = slice(0, height), slice(wave, wave + 1)
            return wave < width
        lead = wave - (height - 1)  # step of the first row, the last to begin
        self.rows = slice(max(0, -lead), min(height, width - lead))
        self.steps = slice(self.rows.start + lead, self.rows.stop + lead)
        return wave < self.waves

    def targets(self) -> tuple[Tensor, Tensor, Tensor]:
        """Block rows of the whole stack and block columns, on the CPU, and what the blocks are rounded towards."""
        width = self.blocks.shape[2]
        self.row_numbers = torch.arange(self.rows.start, self.rows.stop)
        self.column_numbers = (width - 1 - torch.arange(self.steps.start, self.steps.stop)).expand(len(self.row_numbers))
        self.own = self.blocks[self.row_numbers, :, self.column_numbers]
        if self.row_carry is None or self.around is None:
            end = (width - self.steps.start) * BLOCK_COLUMNS
            self.fed = (self.error.flatten(2).flatten(0, 1)[:, end:] @ self.carry[end:, end - BLOCK_COLUMNS : end]).view_as(self.own)
            target = self.own + self.fed
        else:
            self.fed = torch.bmm(self.error[self.rows].flatten(2), self.carry[self.steps])
            target = self.own + self.fed + torch.bmm(self.row_carry[self.rows], self.around[self.steps].flatten(1, 2))
        return self.row_numbers + self.first, self.column_numbers, target

    def take(self, made: Tensor) -> None:
        """What the blocks became."""
        error = self.own - made
        self.made[self.row_numbers, :, self.column_numbers] = made
        self.error[self.row_numbers, :, self.column_numbers] = error
        if self.around is not None:
            self.around[torch.arange(self.steps.start, self.steps.stop), self.row_numbers] = error + self.fed


def _best_scales(unit: Tensor, made: Tensor, feedback: Feedback) -> Tensor:
    """Of one weight. Coupled rows are fitted together: with L L^T and G the metrics, M' = M L and W' = W L, (G * M' M'^T) s = row sums of
    G * M' W'^T."""
    felt, wanted = feedback.whitened(made), feedback.whitened(unit)
    energy = felt.square().sum(dim=1, dtype=torch.float64)
    if feedback.outputs is None:
        product = (felt * wanted).sum(dim=1, dtype=torch.float64)
        return torch.where(energy > 0, product / energy.clamp_min(1e-30), 0)
    scales = torch.zeros_like(energy)
    height = len(feedback.outputs.judge)  # the rest is padding
    rows = energy[:height].gt(0).nonzero().flatten()
    metric = feedback.outputs.damped.double()[rows][:, rows]
    metric = metric / metric.diagonal().mean() / energy[rows].mean()
    felt, wanted = felt[rows].double(), wanted[rows].double()
    coupled, aim = metric * (felt @ felt.t()), (metric * (felt @ wanted.t())).sum(dim=1)
    found, failed = torch.linalg.solve_ex(coupled, aim)
    alone = aim / coupled.diagonal()  # near what each row would have by itself, where rows cannot be told apart
    scales[rows] = found if not failed and bool(found.isfinite().all()) else alone
    return scales
