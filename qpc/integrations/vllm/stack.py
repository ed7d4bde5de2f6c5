"""Which rows and columns of stored linears a layer of vLLM holds on one rank, stacked into one packed weight."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from qpc.errors import CheckpointError, QuantizerError
from qpc.integrations.vllm.stored import StoredWeight
from qpc.quant.layout import BLOCK_COLUMNS, BLOCK_ROWS
from qpc.quant.rotation import Rotation
from qpc.quant.shard import Shard


@dataclass(frozen=True)
class Rank:
    """One of the ranks of tensor parallelism."""

    index: int = 0
    size: int = 1

    def part(self, whole: int, size: int) -> range:
        """Its part of `whole` rows or columns that are cut in parts of `size`; neighbours hold the same if these are few."""
        start = self.index * (whole // size) // self.size * size
        return range(start, start + size)

    def can_part(self, whole: int, size: int) -> bool:
        """Whether the parts are whole, and each is that of as many ranks as the others."""
        return 0 < size <= whole and whole % size == 0 and self.size % (whole // size) == 0


@dataclass(frozen=True)
class Piece:
    """Rows of one member, by its position among them, and the block row of the stack where they begin."""

    member: int
    place: int
    shard: Shard


@dataclass(frozen=True)
class Stack:
    """The pieces of a layer, one below the other, each from a new block on; of one quantizer, one rotation and one range of columns."""

    pieces: tuple[Piece, ...]

    @staticmethod
    def of(layer: str, members: Sequence[StoredWeight], outputs: Sequence[tuple[int, int]], inputs: int, rank: Rank) -> "Stack":
        """The share of a rank.

        members: stored linears that agree (`stored.members`). outputs: of each part of the layer the rows in all and on one rank; each part
        is a member, or all of them are rows of a single one. inputs: columns on one rank.
        Raises `CheckpointError` if the shapes do not fit, or a share does not consist of whole blocks.
        """
        wholes = [whole for whole, _ in outputs]
        sizes = [stored.out_features for stored in members]
        fits = all(rank.can_part(*axis) for axis in (*outputs, (members[0].in_features, inputs)))
        if sizes not in (wholes, [sum(wholes)]) or not fits:
            there = ", ".join(f"{stored.name} {stored.out_features}x{stored.in_features}" for stored in members)
            needed = f"{'+'.join(str(size) for _, size in outputs)}x{inputs}"
            raise CheckpointError(f"each of {rank.size} ranks needs {needed} of {layer}, the checkpoint has {there}; it does not fit")
        shares = [rank.part(*output) for output in outputs]
        if sizes == wholes:
            owners = list(range(len(members)))
        else:
            owners, starts = [0] * len(shares), accumulate(wholes[:-1], initial=0)
            shares = [range(share.start + start, share.stop + start) for share, start in zip(shares, starts, strict=True)]
        columns = rank.part(members[0].in_features, inputs)
        pieces: list[Piece] = []
        for owner, rows in _joined(owners, shares):
            place = pieces[-1].place + pieces[-1].shard.row_blocks if pieces else 0
            pieces.append(Piece(owner, place, _shard(layer, members[owner], rows, columns)))
        return Stack(tuple(pieces))

    @staticmethod
    def of_table(table: StoredWeight, rows: int, rank: Rank) -> "Stack":
        """The share of a rank of a table: so many rows, or those that are left. Raises `CheckpointError` as `of` does."""
        start = rank.index * rows
        held = range(start, min(start + rows, table.out_features))
        return Stack((Piece(0, 0, _shard(table.name, table, held, range(table.in_features))),))

    @property
    def shard(self) -> Shard:
        """The first piece: what all have in common can be read from it."""
        return self.pieces[0].shard

    @property
    def row_blocks(self) -> int:
        """Blocks that cover all pieces."""
        return self.pieces[-1].place + self.pieces[-1].shard.row_blocks

    @property
    def kept(self) -> tuple[slice, ...]:
        """The rows that are no padding, of each piece; a single slice if there is no padding between two."""
        slices: list[slice] = []
        for piece in self.pieces:
            start = piece.place * BLOCK_ROWS
            stop = start + len(piece.shard.rows)
            slices.append(slice(slices.pop().start if slices and slices[-1].stop == start else start, stop))
        return tuple(slices)

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor, by the name that a stored one has. Codes of a part that lies on other ranks have no columns."""
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for index, (part, columns) in enumerate(self.shard.parts):
            found[f"codes{index}"] = (self.row_blocks, columns.stop - columns.start, part.block_words), torch.int32
        signs = Rotation.bytes_for(len(self.shard.columns)) if self.shard.block else 0
        return found | {"scales": ((self.row_blocks * BLOCK_ROWS,), torch.bfloat16), "signs": ((signs,), torch.uint8)}

    def rows_of(self, leaf: str, piece: Piece) -> slice:
        """Where a piece lies in a tensor of the stack."""
        if leaf == "signs":
            return slice(None)
        unit = BLOCK_ROWS if leaf == "scales" else 1
        return slice(piece.place * unit, (piece.place + piece.shard.row_blocks) * unit)


def _joined(owners: Sequence[int], shares: Sequence[range]) -> list[tuple[int, range]]:
    """Ranges with their owners, those that follow each other in one owner as one."""
    joined: list[tuple[int, range]] = []
    for owner, share in zip(owners, shares, strict=True):
        if joined and joined[-1][0] == owner and joined[-1][1].stop == share.start:
            joined[-1] = owner, range(joined[-1][1].start, share.stop)
        else:
            joined.append((owner, share))
    return joined


def _shard(layer: str, stored: StoredWeight, rows: range, columns: range) -> Shard:
    """Rows and columns of a stored weight. Raises `CheckpointError` that says how to split it."""
    try:
        return Shard(stored.out_features, stored.in_features, stored.quantizer, stored.block, rows, columns)
    except QuantizerError as error:
        narrow = len(columns) < stored.in_features
        advice = f"split its rows into {_parts(stored.out_features, BLOCK_ROWS)} parts"
        if narrow and len(columns) % BLOCK_COLUMNS:
            advice = f"split its columns into {_parts(stored.in_features, BLOCK_COLUMNS)} parts"
        elif narrow and stored.block and len(columns) % stored.block:
            power = len(columns) & -len(columns)  # what suits a narrower layer suits a wider one, if both are powers of two
            advice = f"compile again with --rotation-block {power}, or take one rank"
        raise CheckpointError(f"{layer} cannot be split like this: {stored.leaf}: {error}; {advice}") from error


def _parts(size: int, step: int) -> str:
    """The numbers of parts in which an axis can be cut between steps, in words."""
    counts = [count for count in range(1, size // step + 1) if size % (count * step) == 0] or [1]
    return ", ".join(map(str, counts[:-1])) + (" or " if counts[1:] else "") + str(counts[-1])
