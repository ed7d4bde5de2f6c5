"""Candidate codes: what a window decodes to, and the PTX that decodes it.

A candidate's `decode` is the definition, in numpy, exact. Its `ptx` reads the shifted word, whose bits above the window are garbage, and
leaves what the tensor core multiplies; extraction by a funnel shift is counted apart. Scales are free: they join the row's scale. The
codes of this file leave the pair as two halves in `$0`, those of `byte_sums` one to three words of bytes.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.codes.hashes import byte, halves, multiply_add, multiply_high, windows

Points = NDArray[np.float64]
"""[2^window_bits, 2]."""


class Code(Protocol):
    """A computed code. `dimension` weights come from one window; a code of dimension 1 fills the second column with zeros."""

    @property
    def name(self) -> str: ...

    @property
    def dimension(self) -> int: ...

    @property
    def registers(self) -> int:
        """32-bit registers that a pair takes to the tensor core: also its products per eight weights of a thread."""
        ...

    def decode(self, window_bits: int) -> Points:
        """Weights of every window of this length."""
        ...

    def ptx(self, window_bits: int) -> str:
        """Inline PTX from the word, `$N` with N = registers, to `$0` ... `$N-1`."""
        ...


@dataclass(frozen=True)
class MaskedByteDifferences:
    """Sums of byte differences of one or two multiply-adds of the masked window.

    The PTX puts bytes under the exponent of 1024, so that they are halves without a conversion.
    """

    factors: tuple[int, ...]
    addends: tuple[int, ...]

    dimension = 2
    registers = 1

    @property
    def name(self) -> str:
        return f"byte differences of {len(self.factors)}"

    def decode(self, window_bits: int) -> Points:
        total = np.zeros((1 << window_bits, 2))
        for factor, addend in zip(self.factors, self.addends, strict=True):
            h = multiply_add(windows(window_bits), factor, addend)
            total += np.stack([byte(h, 2) - byte(h, 1), byte(h, 3) - byte(h, 0)], axis=-1)
        return total

    def ptx(self, window_bits: int) -> str:
        lines = [".reg .b32 w,h,a,b,s,t,c;", f"and.b32 w,$1,{(1 << window_bits) - 1};", "mov.b32 c,0x64646464;"]
        for index, (factor, addend) in enumerate(zip(self.factors, self.addends, strict=True)):
            lines += [f"mad.lo.u32 h,w,{factor},{addend};", "prmt.b32 a,h,c,0x4342;", "prmt.b32 b,h,c,0x4041;"]
            lines += ["sub.rn.f16x2 t,a,b;", "mov.b32 s,t;" if index == 0 else "add.rn.f16x2 s,s,t;"]
        return " ".join([*lines, "mov.b32 $0,s;"])


@dataclass(frozen=True)
class MaskedHalves:
    """The sum of two halves, each a masked and xored multiply-add of the masked window: QTIP's 3INST (arXiv 2406.11235), in pairs."""

    factors: tuple[int, int]
    addends: tuple[int, int]
    keep: int = 0x8FFF
    flip: int = 0x3B60

    dimension = 2
    registers = 1

    @property
    def name(self) -> str:
        return f"masked window, two halves, {self.keep:04X}^{self.flip:04X}"

    def decode(self, window_bits: int) -> Points:
        first, second = (
            halves((multiply_add(windows(window_bits), factor, addend) & self.keep * 0x10001) ^ self.flip * 0x10001)
            for factor, addend in zip(self.factors, self.addends, strict=True)
        )
        return (first + second).astype(np.float64)

    def ptx(self, window_bits: int) -> str:
        keep, flip = self.keep * 0x10001, self.flip * 0x10001
        terms = " ".join(
            f"mad.lo.u32 {r},w,{factor},{addend}; lop3.b32 {r},{r},{keep},{flip},0x6a;"
            for r, factor, addend in zip("ab", self.factors, self.addends, strict=True)
        )
        return f".reg .b32 w,a,b; and.b32 w,$1,{(1 << window_bits) - 1}; {terms} add.rn.f16x2 $0,a,b;"


@dataclass(frozen=True)
class OneHalf:
    """3INST of QTIP in one dimension: the two halves of one masked hash, added. Two windows make a pair; each has a shift and a mask."""

    factor: int = 89226354
    addend: int = 64248484

    dimension = 1
    registers = 1
    name = "1-D 3INST"

    def decode(self, window_bits: int) -> Points:
        pair = halves((multiply_add(windows(window_bits), self.factor, self.addend) & 0x8FFF8FFF) ^ 0x3B603B60)
        return np.stack([(pair[:, 0] + pair[:, 1]).astype(np.float64), np.zeros(len(pair))], axis=-1)

    def ptx(self, window_bits: int) -> str:
        mask = (1 << window_bits) - 1
        terms = " ".join(
            f"and.b32 {r},{source},{mask}; mad.lo.u32 {r},{r},{self.factor},{self.addend}; lop3.b32 {r},{r},0x8fff8fff,0x3b603b60,0x6a;"
            for r, source in (("a", "$1"), ("b", "b"))
        )
        joined = "prmt.b32 c,a,b,0x5410; prmt.b32 d,a,b,0x7632; add.rn.f16x2 $0,c,d;"
        return f".reg .b32 a,b,c,d; shr.u32 b,$1,{32 - window_bits}; {terms} {joined}"


@dataclass(frozen=True)
class Folded:
    """Hash of the shifted word without a mask; what is made of it is up to the classes below.

    h1 = word * (spread 2^(32 - window_bits)) mod 2^32 drops the garbage above the window by itself and leaves it, permuted, in the high
    bits; h2, the high half of its signed product with `fold`, has every bit depend on all of them.
    """

    spread: int
    fold: int

    dimension = 2
    registers = 1

    def hashed(self, window_bits: int) -> NDArray[np.int64]:
        """h2 of every window."""
        return multiply_high(multiply_add(windows(window_bits), (self.spread << (32 - window_bits)) & 0xFFFFFFFF), self.fold)

    def hash_ptx(self, window_bits: int) -> str:
        """Declares the registers a, b and c, and leaves h2 in a."""
        factor = (self.spread << (32 - window_bits)) & 0xFFFFFFFF
        return f".reg .b32 a,b,c; mul.lo.u32 a,$1,{factor}; mul.hi.s32 a,a,{self.fold};"


@dataclass(frozen=True)
class FoldedHalf(Folded):
    """One half straight from h2: four instructions, with the shift."""

    name = "folded, one half"

    def decode(self, window_bits: int) -> Points:
        return halves(self.hashed(window_bits) & 0x8FFF8FFF).astype(np.float64)

    def ptx(self, window_bits: int) -> str:
        return f"{self.hash_ptx(window_bits)} and.b32 $0,a,0x8fff8fff;"


@dataclass(frozen=True)
class FoldedHalves(Folded):
    """The sum of two halves, from h2 and from h3 = h2 * `mix` + `shift`: seven instructions, with the shift.

    The mask leaves a sign and a small exponent. The exponent 0 is that of the subnormals, so the half is uniform on [0, 1), [1, 2), [2, 4)
    and [4, 8) units of 2^-14, a quarter each, without a hole at zero.
    """

    mix: int
    shift: int
    keep: int = 0x8FFF

    @property
    def name(self) -> str:
        return f"folded, two halves, {self.keep:04X}"

    def decode(self, window_bits: int) -> Points:
        h2 = self.hashed(window_bits)
        keep = self.keep * 0x10001
        return (halves(h2 & keep) + halves(multiply_add(h2, self.mix, self.shift) & keep)).astype(np.float64)

    def ptx(self, window_bits: int) -> str:
        keep = self.keep * 0x10001
        return (
            f"{self.hash_ptx(window_bits)} mad.lo.u32 b,a,{self.mix},{self.shift};"
            f" and.b32 a,a,{keep}; and.b32 b,b,{keep}; add.rn.f16x2 $0,a,b;"
        )


@dataclass(frozen=True)
class FoldedFused(FoldedHalves):
    """`FoldedHalves` with longer tails: p r + q, where p and q are the two halves and r, in [1, 2), has the high mantissa bits of q.

    Eight instructions, with the shift. r keeps 8 bits of mantissa, so that p r + q is exact in float32: a fused multiply-add in half is
    the same as float32 arithmetic rounded once.
    """

    stretch: int = 0x03FC

    @property
    def name(self) -> str:
        return "folded, p r + q"

    def decode(self, window_bits: int) -> Points:
        h2 = self.hashed(window_bits)
        h3 = multiply_add(h2, self.mix, self.shift)
        p, q = (halves(h & self.keep * 0x10001).astype(np.float32) for h in (h2, h3))
        r = halves(h3 & self.stretch * 0x10001 ^ 0x3C003C00).astype(np.float32)
        return (p * r + q).astype(np.float16).astype(np.float64)

    def ptx(self, window_bits: int) -> str:
        keep, stretch = self.keep * 0x10001, self.stretch * 0x10001
        return (
            f"{self.hash_ptx(window_bits)} mad.lo.u32 b,a,{self.mix},{self.shift}; lop3.b32 c,b,{stretch},0x3c003c00,0x6a;"
            f" and.b32 a,a,{keep}; and.b32 b,b,{keep}; fma.rn.f16x2 $0,a,c,b;"
        )
