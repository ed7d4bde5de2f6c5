"""Candidate codes whose weights are sums of bytes: what a window decodes to, and the PTX that decodes it.

Two or three hash words of a window go to the tensor core as they are, four signed bytes each, and its product of bytes makes the sums: the
bytes of one weight meet the same activation. So no mask, no conversion and no addition belongs to decoding, and a weight is an exact
integer. The mean of a byte, -1/2, stays in it.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from benchmarks.codes.candidates import Points
from benchmarks.codes.hashes import Words, byte, multiply_add, multiply_high, multiply_wide, permute, windows

BYTE_REVERSAL = 0x0123
"""Selector of `prmt` that puts the most significant byte lowest."""


@dataclass(frozen=True)
class ByteSums:
    """The first hash of the window, and the sums; the words are up to the classes below.

    a = word * (spread 2^(32 - window_bits)) mod 2^32 drops the garbage above the window by itself. Its top byte depends on the whole
    window, byte 0 on nothing: it is zero up to windows of 24 bits.
    """

    spread: int

    dimension: ClassVar[int] = 2
    registers: ClassVar[int] = 2
    columns: ClassVar[tuple[int, int, int, int]] = (0, 1, 0, 1)
    """Which weight of the pair each byte of a word belongs to, the lowest byte first."""

    @abstractmethod
    def hashed(self, window_bits: int) -> tuple[Words, ...]:
        """The words of every window: `registers` arrays of [2^window_bits]."""

    def spread_windows(self, window_bits: int) -> Words:
        """a of every window."""
        return multiply_add(windows(window_bits), self.factor(window_bits))

    def factor(self, window_bits: int) -> int:
        """What a word is multiplied by first."""
        return (self.spread << (32 - window_bits)) & 0xFFFFFFFF

    def decode(self, window_bits: int) -> Points:
        """Weights of every window of this length."""
        words = self.hashed(window_bits)
        return np.stack([self._sums(words, weight) for weight in (0, 1)], axis=-1)

    def _sums(self, words: tuple[Words, ...], weight: int) -> NDArray[np.float64]:
        chosen = [byte(word, index) for word in words for index, column in enumerate(self.columns) if column == weight]
        return sum(((each ^ 0x80) - 0x80 for each in chosen), start=np.zeros_like(words[0])).astype(np.float64)


@dataclass(frozen=True)
class PermutedByteSums(ByteSums):
    """Each word is a multiply-add of c, which is a with its bytes reversed: what a low byte of a product sees is the best byte of a."""

    factors: tuple[int, ...]
    addends: tuple[int, ...]

    @property
    def registers(self) -> int:  # type: ignore[override]
        return len(self.factors)

    @property
    def name(self) -> str:
        return f"byte sums, {len(self.factors)} words"

    def hashed(self, window_bits: int) -> tuple[Words, ...]:
        c = permute(self.spread_windows(window_bits), BYTE_REVERSAL)
        return tuple(multiply_add(c, factor, addend) for factor, addend in zip(self.factors, self.addends, strict=True))

    def ptx(self, window_bits: int) -> str:
        hashes = "".join(
            f" mad.lo.u32 ${index},c,{factor},{addend};"
            for index, (factor, addend) in enumerate(zip(self.factors, self.addends, strict=True))
        )
        first = f"mul.lo.u32 a,${self.registers},{self.factor(window_bits)};"
        return f".reg .b32 a,c; {first} prmt.b32 c,a,a,{BYTE_REVERSAL};{hashes}"


@dataclass(frozen=True)
class FoldedByteSums(ByteSums):
    """The hashes of `FoldedHalves`: u, the high half of the signed product of a with `fold`, and v, a multiply-add of u."""

    fold: int
    mix: int
    shift: int

    name = "byte sums, folded"

    def hashed(self, window_bits: int) -> tuple[Words, ...]:
        u = multiply_high(self.spread_windows(window_bits), self.fold)
        return u, multiply_add(u, self.mix, self.shift)

    def ptx(self, window_bits: int) -> str:
        first = f"mul.lo.u32 a,$2,{self.factor(window_bits)}; mul.hi.s32 u,a,{self.fold};"
        return f".reg .b32 a,u; {first} mad.lo.u32 $1,u,{self.mix},{self.shift}; mov.b32 $0,u;"


@dataclass(frozen=True)
class WideByteSums(ByteSums):
    """Two words from one unsigned 64-bit product with `fold`, of a itself or of a permutation of its bytes.

    The fold must be near 2^32, so that the top byte of the high word is nearly even.
    """

    fold: int
    selector: int | None = None
    """Of `prmt`; None multiplies a itself."""
    third: tuple[int, int] | None = None
    """Factor and addend of a third word, a multiply-add of what the 64-bit product multiplies."""

    @property
    def registers(self) -> int:  # type: ignore[override]
        return 2 if self.third is None else 3

    @property
    def columns(self) -> tuple[int, int, int, int]:  # type: ignore[override]
        return (0, 1, 0, 1) if self.selector is None else (0, 1, 1, 0)

    @property
    def name(self) -> str:
        permuted, third = "" if self.selector is None else ", permuted", "" if self.third is None else ", 3 words"
        return f"byte sums, wide product{permuted}{third}"

    def hashed(self, window_bits: int) -> tuple[Words, ...]:
        a = self.spread_windows(window_bits)
        c = a if self.selector is None else permute(a, self.selector)
        return (*multiply_wide(c, self.fold), *(() if self.third is None else (multiply_add(c, *self.third),)))

    def ptx(self, window_bits: int) -> str:
        permuted = "" if self.selector is None else f" prmt.b32 a,a,a,{self.selector};"
        third = "" if self.third is None else f" mad.lo.u32 $2,a,{self.third[0]},{self.third[1]};"
        first = f"mul.lo.u32 a,${self.registers},{self.factor(window_bits)};{permuted}"
        return f".reg .b32 a; .reg .b64 p; {first} mul.wide.u32 p,a,{self.fold}; mov.b64 {{$0,$1}},p;{third}"
