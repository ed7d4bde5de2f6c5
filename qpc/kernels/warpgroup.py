"""The product of a warpgroup: words of four warps times an operand in shared memory, by `wgmma` m64nNk32, for 8 or 16 rows of a batch.

`mma` m16n8k32 has 8 columns, which are four rows of a batch in two limbs, so that more rows take each word again. `wgmma` has as many
columns as the operand has limbs, and multiplies each word once. Its registers of A are those of `mma` for each of the four warps, which
have a block row each, and sums come out where `mma` leaves them. What differs is B, which the tensor cores read from shared memory by a
descriptor: in *core matrices* of 8 columns of 16 bytes that lie in one piece. These 16 bytes are of four lanes, and `mma` has what one
lane needs in one piece; so the operand for `wgmma` is in another order, `IN_CORES`.

Products run on while a warp decodes the next words; registers that they read or add to are free again after `wait_group`. Every text takes
all sums, and leaves them in their registers, so that nothing that the compiler moves comes between.
"""

from enum import Enum

from torch import Tensor

ROWS = (8, 16)
"""Rows of an operand for which there is this product: one that has four takes each word once in either."""

IN_CORES = (0, 4, 5, 1, 2, 3)
"""Where the axes of an operand come from: int32 [column_blocks, 2 (word), 2 (half), rows, 2 (limb), 4 (t)]."""


class Product(Enum):
    """Which instruction multiplies words by the operand."""

    MMA = "mma"
    WGMMA = "wgmma"

    def __str__(self) -> str:
        """The name that `Product` takes."""
        return self.value


def in_cores(words: Tensor) -> Tensor:
    """The words of an operand as `pack_operand` has them, [column_blocks, rows, 2, 4, 2, 2], in the order of `Product.WGMMA`."""
    return words.permute(IN_CORES).contiguous()


def distance(operand_rows: int) -> int:
    """From the first 16 bytes of a column to the second, which are of the other half of a column block; in units of 16 bytes."""
    return 2 * int(operand_rows)


def issue(tiles: int, words: int, half: int) -> str:
    """Begin the products of half a block, m64n(8 tiles)k32, after those before the last ones.

    $0 on: all sums, of which those of the quarters 2 half and 2 half + 1 change; then the same as arguments; then four registers of each
    word of each of the two quarters, quarters foremost; last the lower half of the descriptor of each word's operand. Products by one
    descriptor follow each other, so that it is made once.
    """
    tiles, words, half = int(tiles), int(words), int(half)
    sums, each = 16 * tiles, 4 * tiles
    text = "{.reg .pred p; .reg .b64 d<2>; setp.ne.b32 p, 1, 0; "  # the upper half: the distance of core matrices along the columns
    for word in range(words):
        text += f"mov.b64 d{word}, {{${2 * sums + 8 * words + word}, 8}}; "
    text += "wgmma.fence.sync.aligned; "
    for word in range(words):
        for quarter in range(2):
            c = ", ".join([f"${(2 * half + quarter) * each + i}" for i in range(each)])
            a = ", ".join([f"${2 * sums + 4 * (quarter * words + word) + i}" for i in range(4)])
            text += f"wgmma.mma_async.sync.aligned.m64n{8 * tiles}k32.s32.s8.s8 {{{c}}}, {{{a}}}, d{word}, p; "
    return text + "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1;}"


def issue_constraints(tiles: int, words: int) -> str:
    """Of the registers of `issue`."""
    sums = 16 * int(tiles)
    return ",".join(["=r"] * sums + [str(i) for i in range(sums)] + ["r"] * (9 * int(words)))


WAIT_FOR_PRODUCTS = "wgmma.wait_group.sync.aligned 0;"
"""Wait for all products: sums may be read then, and the operand overwritten."""


def wait_constraints(tiles: int) -> str:
    """Of sums that stay in their registers."""
    sums = 16 * int(tiles)
    return ",".join(["=r"] * sums + [str(i) for i in range(sums)])
