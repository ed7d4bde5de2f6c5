"""The order of the weights in a block, against its definition."""

import torch

from qpc.quant.layout import BLOCK_COLUMNS, BLOCK_ROWS, column_blocks, from_blocks, row_blocks, to_blocks


def test_every_pair_lies_where_the_definition_says() -> None:
    matrix = torch.arange(2 * BLOCK_ROWS * 3 * BLOCK_COLUMNS).reshape(2 * BLOCK_ROWS, 3 * BLOCK_COLUMNS)
    blocks = to_blocks(matrix)
    assert blocks.shape == (2, 3, 1024)
    for group in range(8):
        for thread in range(4):
            for tile in range(4):
                for quarter in range(4):
                    pair = 16 * (4 * group + thread) + 4 * tile + quarter
                    row, column = 16 * tile + group + 8 * (quarter % 2), 2 * (thread + 4 * (quarter // 2))
                    assert torch.equal(blocks[1, 2, 2 * pair : 2 * pair + 2], matrix[64 + row, 32 + column : 34 + column])


def test_blocks_are_put_together_again() -> None:
    matrix = torch.randn(3 * BLOCK_ROWS, 5 * BLOCK_COLUMNS)
    assert torch.equal(from_blocks(to_blocks(matrix)), matrix)
    assert torch.equal(from_blocks(to_blocks(matrix)[1:, 2:]), matrix[64:, 32:])


def test_blocks_that_cover() -> None:
    assert [row_blocks(n) for n in (1, 64, 65)] == [1, 1, 2] and [column_blocks(n) for n in (1, 16, 17)] == [1, 1, 2]
