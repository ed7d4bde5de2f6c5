"""Linears of one input whose packed weights are row ranges of one."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qpc.quant.layout import BLOCK_ROWS, row_blocks
from qpc.quant.quantizer import PackedWeight

if TYPE_CHECKING:
    from qpc.kernels.linear import QuantizedLinear


class RowGroup:
    """Linears of one quantizer that read one value through the same signs. Each holds its rows as views of the group's tensors.

    Eagerly each multiplies by its own rows. While a graph is traced, the first multiplies by all rows, and those that read the same value
    after it take theirs of that; the last one forgets it.

    members: all but the last with out_features divisible by 64, so that no padding row lies between two.
    codes, scales, signs: as a packed weight of all rows has them. whole: whether the members are views of these; while a model is moved,
    some are not.
    """

    def __init__(self, members: Sequence["QuantizedLinear"]) -> None:
        self.members = tuple(members)
        self.codes: tuple[Tensor, ...] = ()
        self.scales = members[0].scales
        self.signs = members[0].signs
        self.whole = False
        self._traced: tuple[Tensor, Tensor] | None = None
        self.join()

    @property
    def out_features(self) -> int:
        """Rows of all members."""
        return sum(member.out_features for member in self.members)

    def traced(self, member: "QuantizedLinear", x: Tensor, multiply: Callable[["RowGroup", Tensor], Tensor]) -> Tensor:
        """The product of a member, in a graph. multiply: by all rows."""
        if member is self.members[0] or self._traced is None or self._traced[0] is not x:
            self._traced = x, multiply(self, x)
        start = 0
        for each in self.members:
            if each is member:
                break
            start += each.out_features
        rows = self._traced[1][..., start : start + member.out_features]
        if member is self.members[-1]:
            self._traced = None
        return rows

    @property
    def bias(self) -> Tensor | None:
        """The biases of all rows, zero where a member has none; None if none has one."""
        known = [member.bias for member in self.members]
        like = next((bias for bias in known if bias is not None), None)
        if like is None:
            return None
        pairs = zip(known, self.members, strict=True)
        return torch.cat([like.new_zeros(member.out_features) if bias is None else bias for bias, member in pairs])

    def join(self) -> None:
        """Put the weights of the members together again, unless they are, or lie on different devices."""
        self.whole = bool(self.codes) and all(self._holds(member) for member in self.members)
        if self.whole or len({member.scales.device for member in self.members}) > 1:
            return
        self.codes, self.scales = stack_rows([member.packed for member in self.members])
        self.signs = self.members[0].signs
        start = 0
        for member in self.members:
            blocks = row_blocks(member.out_features)
            for index, part in enumerate(self.codes):
                setattr(member, f"codes{index}", part[start : start + blocks])
            member.scales = self.scales[start * BLOCK_ROWS : (start + blocks) * BLOCK_ROWS]
            member.signs = self.signs
            start += blocks
        self.whole = True

    def _holds(self, member: "QuantizedLinear") -> bool:
        pairs = zip((*member.codes, member.scales, member.signs), (*self.codes, self.scales, self.signs), strict=True)
        return all(own.untyped_storage()._cdata == whole.untyped_storage()._cdata for own, whole in pairs)


def stack_rows(weights: Sequence[PackedWeight]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Codes and scales of several weights of one quantizer and one rotation as those of a single one; views where they are that already.

    All but the last must have out_features divisible by 64, so that no padding row lies between two members.
    """
    assert all(w.out_features % BLOCK_ROWS == 0 for w in weights[:-1]), "padding rows inside a group"
    assert len({w.quantizer for w in weights}) == 1, "a group shares one quantizer"
    if len(weights) == 1:
        return weights[0].codes, weights[0].scales
    codes = tuple(_stacked(parts) for parts in zip(*(w.codes for w in weights), strict=True))
    return codes, _stacked([w.scales for w in weights])


def _stacked(pieces: Sequence[Tensor]) -> Tensor:
    """The pieces as one tensor: what they are views of, if they follow each other there without gaps."""
    first, place = pieces[0], pieces[0].storage_offset()
    for piece in pieces:
        if not piece.is_contiguous() or piece.untyped_storage()._cdata != first.untyped_storage()._cdata or piece.storage_offset() != place:
            return torch.cat(list(pieces))
        place += piece.numel()
    return first.as_strided((sum(map(len, pieces)), *first.shape[1:]), first.stride())
