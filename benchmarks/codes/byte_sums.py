"""Candidate codes whose weights are sums of bytes: what a window decodes to, and the PTX that decodes it.

One to three words of a window go to the tensor core as they are, four signed bytes each, and its product of bytes makes the sums: a byte is
a step along a direction of the plane of the two weights, and meets the activations' projection on it. So no mask, no conversion and no
addition belongs to decoding, and a weight is an exact integer. The mean of a byte, -1/2, stays in it.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from benchmarks.codes.candidates import Points
from benchmarks.codes.hashes import Words, byte, fused_multiply_add, multiply_add, multiply_wide, permute, single_bits, windows

BYTE_REVERSAL = 0x0123
"""Selector of `prmt` that puts the most significant byte lowest."""

START = 0x3F000000
"""Bits above the window: as a float32, 0.5."""

Directions = tuple[tuple[int, int], ...]
"""The steps of the four bytes of a word, the lowest byte first."""

AXES: Directions = ((1, 0), (0, 1), (1, 0), (0, 1))
"""Each byte belongs to one weight."""


@dataclass(frozen=True)
class ByteSums:
    """The sums; the words are up to the classes below."""

    dimension: ClassVar[int] = 2
    registers: ClassVar[int] = 2

    @property
    def steps(self) -> tuple[Directions, ...]:
        """The directions of each word."""
        return (AXES,) * self.registers

    @abstractmethod
    def hashed(self, window_bits: int) -> tuple[Words, ...]:
        """The words of every window: `registers` arrays of [2^window_bits]."""

    def decode(self, window_bits: int) -> Points:
        """Weights of every window of this length."""
        return project(self.hashed(window_bits), self.steps)


def project(words: Sequence[Words], steps: Sequence[Directions]) -> Points:
    """The sums of signed bytes times their steps."""
    total = np.zeros((*words[0].shape, 2), dtype=np.int64)
    for word, directions in zip(words, steps, strict=True):
        for index, step in enumerate(directions):
            total += ((byte(word, index) ^ 0x80) - 0x80)[..., None] * np.array(step)
    return total.astype(np.float64)


@dataclass(frozen=True)
class LinearByteSums(ByteSums):
    """The words are the window times odd constants, with bits set above it so that none is zero.

    The lowest byte of a word depends on the lowest eight bits of the window only, the highest on all.
    """

    factors: tuple[int, ...]
    directions: tuple[Directions, ...] | None = None
    """`AXES` if there are none."""

    @property
    def registers(self) -> int:  # type: ignore[override]
        return len(self.factors)

    @property
    def steps(self) -> tuple[Directions, ...]:
        return super().steps if self.directions is None else self.directions[: self.registers]

    @property
    def name(self) -> str:
        kind = "byte sums" if self.directions is None else "byte projections"
        return f"{kind}, linear, {self.registers} word" + "s" * (self.registers > 1)

    def hashed(self, window_bits: int) -> tuple[Words, ...]:
        return tuple(multiply_add(windows(window_bits) | START, factor) for factor in self.factors)

    def ptx(self, window_bits: int) -> str:
        products = "".join(f" mul.lo.u32 ${index},c,{factor};" for index, factor in enumerate(self.factors))
        return f".reg .b32 c; {masked(self.registers, window_bits)}{products}"


def masked(registers: int, window_bits: int) -> str:
    """PTX from the shifted word to the window with `START` above it, in register c: one LOP3."""
    return f"lop3.b32 c,${registers},{(1 << window_bits) - 1},{START},0xea;"


@dataclass(frozen=True)
class MixedByteSums(ByteSums):
    """Each word is a multiply-add of one hash of the window."""

    factors: tuple[int, ...]
    addends: tuple[int, ...]

    @property
    def registers(self) -> int:  # type: ignore[override]
        return len(self.factors)

    @abstractmethod
    def hash(self, window_bits: int) -> Words:
        """What is mixed, of every window: [2^window_bits]."""

    def hashed(self, window_bits: int) -> tuple[Words, ...]:
        mixed = self.hash(window_bits)
        return tuple(multiply_add(mixed, factor, addend) for factor, addend in zip(self.factors, self.addends, strict=True))

    def mixes(self) -> str:
        """PTX from the hash, in register c, to the words."""
        constants = enumerate(zip(self.factors, self.addends, strict=True))
        return "".join(f" mad.lo.u32 ${index},c,{factor},{addend};" for index, (factor, addend) in constants)


@dataclass(frozen=True)
class FusedByteSums(MixedByteSums):
    """The hash is g, the bits of a fused multiply-add in float32: g = f C + D, rounded once.

    f has the window in its mantissa, from 0.5 on; the highest bit of a window of 24 bits doubles it instead. D is near -C times the middle
    of all f, so that g is small and of either sign: its mantissa has the middle bits of the product, which depend on the whole window, and
    sign and exponent depend on it as well.
    """

    scale: float
    """C, a float32."""

    directions: tuple[Directions, ...] | None = None
    """`AXES` if there are none."""

    @property
    def steps(self) -> tuple[Directions, ...]:
        return super().steps if self.directions is None else self.directions

    @property
    def name(self) -> str:
        return f"byte {'sums' if self.directions is None else 'projections'}, fused, {len(self.factors)} words"

    def offset(self, window_bits: int) -> float:
        """D."""
        return float(np.float32(-self.scale * (0.5 + 2.0 ** (window_bits - 25))))

    def hash(self, window_bits: int) -> Words:
        return fused_multiply_add(windows(window_bits) | START, self.scale, self.offset(window_bits))

    def ptx(self, window_bits: int) -> str:
        scale, offset = (f"0f{single_bits(each):08X}" for each in (self.scale, self.offset(window_bits)))
        mask = f"{masked(self.registers, window_bits)} mov.b32 f,c;"
        return f".reg .b32 c; .reg .f32 f; {mask} fma.rn.f32 f,f,{scale},{offset}; mov.b32 c,f;{self.mixes()}"


def spread_windows(spread: int, window_bits: int) -> Words:
    """a = word * (spread 2^(32 - window_bits)) mod 2^32, which drops the garbage above the window by itself: [2^window_bits].

    Its top byte depends on the whole window, byte 0 on nothing: it is zero up to windows of 24 bits.
    """
    return multiply_add(windows(window_bits), spread_factor(spread, window_bits))


def spread_factor(spread: int, window_bits: int) -> int:
    """What a word is multiplied by to spread its window."""
    return (spread << (32 - window_bits)) & 0xFFFFFFFF


@dataclass(frozen=True)
class PermutedByteSums(MixedByteSums):
    """The hash is a with its bytes reversed: what a low byte of a product sees is then the best byte of a."""

    spread: int

    @property
    def name(self) -> str:
        return f"byte sums, permuted, {len(self.factors)} words"

    def hash(self, window_bits: int) -> Words:
        return permute(spread_windows(self.spread, window_bits), BYTE_REVERSAL)

    def ptx(self, window_bits: int) -> str:
        first = f"mul.lo.u32 c,${self.registers},{spread_factor(self.spread, window_bits)};"
        return f".reg .b32 c; {first} prmt.b32 c,c,c,{BYTE_REVERSAL};{self.mixes()}"


@dataclass(frozen=True)
class WideByteSums(ByteSums):
    """Two words from one unsigned 64-bit product with `fold`, of a with its bytes permuted.

    The fold must be near 2^32, so that the top byte of the high word is nearly even.
    """

    spread: int
    fold: int

    selector: ClassVar[int] = 0x3213
    """Of `prmt`."""
    name = "byte sums, wide product"

    @property
    def steps(self) -> tuple[Directions, ...]:
        return (((1, 0), (0, 1), (0, 1), (1, 0)),) * 2

    def hashed(self, window_bits: int) -> tuple[Words, ...]:
        return multiply_wide(permute(spread_windows(self.spread, window_bits), self.selector), self.fold)

    def ptx(self, window_bits: int) -> str:
        first = f"mul.lo.u32 a,$2,{spread_factor(self.spread, window_bits)}; prmt.b32 a,a,a,{self.selector};"
        return f".reg .b32 a; .reg .b64 p; {first} mul.wide.u32 p,a,{self.fold}; mov.b64 {{$0,$1}},p;"
