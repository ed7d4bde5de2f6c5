"""The blocks that a packed weight is made of, and the order of the weights in them.

A block is 64 rows by 16 columns. Its 1024 weights form 512 pairs of neighbouring columns, in the order in which the 32 lanes of a warp hold
the A operand of a 16 x 8 x 16 tensor-core product, four such tiles below each other: of tile i, lane 4 g + t holds the pairs t and t + 4 of
rows g and g + 8. So pair p = 16 (4 g + t) + 4 i + q lies in row 16 i + g + 8 (q % 2), columns 2 (t + 4 (q // 2)) and the next, and a kernel
moves no weight between lanes. Every family of quantizers codes a block on its own, in this order: any range of block rows or block columns
of a packed weight is a packed weight too, and a block column is what error feedback rounds at a time.

Why this shape: `benchmarks/studies/README.md`.
"""

from torch import Tensor

BLOCK_ROWS = 64
BLOCK_COLUMNS = 16
BLOCK_WEIGHTS = BLOCK_ROWS * BLOCK_COLUMNS


def row_blocks(features: int) -> int:
    """Number of blocks that cover `features` rows."""
    return -(-features // BLOCK_ROWS)


def column_blocks(features: int) -> int:
    """Number of blocks that cover `features` columns."""
    return -(-features // BLOCK_COLUMNS)


def to_blocks(matrix: Tensor) -> Tensor:
    """Cut a matrix [row_blocks * 64, column_blocks * 16] into blocks in the order of their pairs: [row_blocks, column_blocks, 1024]."""
    rows, columns = matrix.shape[0] // BLOCK_ROWS, matrix.shape[1] // BLOCK_COLUMNS
    tile_half_group = matrix.reshape(rows, 4, 2, 8, columns, 2, 4, 2)
    return tile_half_group.permute(0, 4, 3, 6, 1, 5, 2, 7).reshape(rows, columns, BLOCK_WEIGHTS)


def from_blocks(blocks: Tensor) -> Tensor:
    """Inverse of `to_blocks`."""
    rows, columns, _ = blocks.shape
    group_pair_tile = blocks.reshape(rows, columns, 8, 4, 4, 2, 2, 2)
    return group_pair_tile.permute(0, 4, 6, 2, 1, 5, 3, 7).reshape(rows * BLOCK_ROWS, columns * BLOCK_COLUMNS)
