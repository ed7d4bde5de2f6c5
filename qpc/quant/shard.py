"""A range of rows and columns of a packed weight, which is a packed weight too: what one rank of tensor parallelism holds.

Codes are cut between blocks and never unpacked. Along the input axis a range must hold whole Hadamard blocks, since each mixes its inputs;
the products of the ranges then add up to that of the whole.
"""

from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from qpc.errors import QuantizerError
from qpc.quant.layout import BLOCK_COLUMNS, BLOCK_ROWS, column_blocks, row_blocks
from qpc.quant.mixed import MixedRateQuantizer
from qpc.quant.quantizer import PackedWeight, Quantizer, UniformQuantizer
from qpc.quant.rotation import Rotation


@dataclass(frozen=True)
class Shard:
    """Where a range lies in each stored tensor of a weight [out_features, in_features].

    block: that of the rotation of the whole weight, 0 if there is none. rows: they begin and end at multiples of 64, or with the weight.
    columns: the same at multiples of 16 and of the block. Raises `QuantizerError` for others.
    """

    out_features: int
    in_features: int
    quantizer: Quantizer
    block: int
    rows: range
    columns: range

    def __post_init__(self) -> None:
        _check("rows", self.rows, self.out_features, BLOCK_ROWS, "a block of codes")
        _check("columns", self.columns, self.in_features, BLOCK_COLUMNS, "a block of codes")
        if self.block:
            _check("columns", self.columns, self.in_features, self.block, "a block of the rotation")

    @property
    def row_blocks(self) -> int:
        """Blocks that cover the rows."""
        return row_blocks(len(self.rows))

    @property
    def parts(self) -> tuple[tuple[UniformQuantizer, slice], ...]:
        """Of each code tensor of the whole weight its quantizer, and the block columns that lie in the range; that may be none."""
        first, last = self.columns.start // BLOCK_COLUMNS, column_blocks(self.columns.stop)
        found, start = [], 0
        for part, width in self.quantizer.parts(self.in_features):
            found.append((part, slice(min(max(first - start, 0), width), min(max(last - start, 0), width))))
            start += width
        return tuple(found)

    @property
    def local_quantizer(self) -> Quantizer:
        """What quantizes the range: of a mixed rate, in the proportion that lies in it."""
        held = [(part, columns.stop - columns.start) for part, columns in self.parts if columns.stop > columns.start]
        if len(held) == 1:
            return held[0][0]
        (high, width), (low, rest) = held
        return MixedRateQuantizer(low, high, Fraction(width, width + rest))

    def place(self, leaf: str) -> tuple[slice, ...]:
        """Where the range lies in a stored tensor of the whole weight. leaf: its name, as in `PackedModule`."""
        blocks = slice(self.rows.start // BLOCK_ROWS, row_blocks(self.rows.stop))
        if leaf == "scales":
            return (slice(blocks.start * BLOCK_ROWS, blocks.stop * BLOCK_ROWS),)
        if leaf == "signs":
            return (slice(self.columns.start // 8, Rotation.bytes_for(self.columns.stop)) if self.block else slice(None),)
        _, columns = self.parts[int(leaf.removeprefix("codes"))]
        return blocks, columns

    def cut(self, leaf: str, tensor: Tensor) -> Tensor:
        """The range of a stored tensor of the whole weight, as a view. leaf: as for `place`."""
        return tensor[self.place(leaf)]


def shard_of(packed: PackedWeight, rows: range, columns: range) -> PackedWeight:
    """A range of a weight as a weight of its own; shares its tensors. Raises `QuantizerError` as `Shard` does."""
    block = packed.rotation.block if packed.rotation is not None else 0
    shard = Shard(packed.out_features, packed.in_features, packed.quantizer, block, rows, columns)
    codes = [shard.cut(f"codes{index}", part) for index, part in enumerate(packed.codes)]
    rotation = None
    if packed.rotation is not None:
        rotation = Rotation(len(columns), block, shard.cut("signs", packed.rotation.signs))
    held = tuple(part for part in codes if part.shape[1])
    return PackedWeight(len(rows), len(columns), shard.local_quantizer, held, shard.cut("scales", packed.scales), rotation)


def _check(axis: str, found: range, size: int, step: int, what: str) -> None:
    """Raise `QuantizerError` unless a range of an axis of this size begins and ends between two steps."""
    if found.step != 1 or not 0 <= found.start < found.stop <= size:
        raise QuantizerError(f"{axis} {found.start} to {found.stop} must be a range of one or more of {size}")
    if found.start % step or (found.stop % step and found.stop != size):
        raise QuantizerError(f"{axis} {found.start} to {found.stop} of {size} must begin and end at multiples of {step} ({what})")
