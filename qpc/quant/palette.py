"""The quantizers that an allocation may use, and their form in files."""

from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from itertools import pairwise
from typing import Any

from qpc.errors import QuantizerError
from qpc.quant.mixed import MixedRateQuantizer
from qpc.quant.quantizer import Quantizer, UniformQuantizer
from qpc.quant.scalar import MAX_BITS, ScalarQuantizer
from qpc.quant.trellis import MAX_STEP_BITS, MAX_WINDOW_BITS, MIN_STEP_BITS, TrellisQuantizer
from qpc.quant.vector import BITS, VectorQuantizer

QUARTER = Fraction(1, 4)


class Effort(Enum):
    """How long the encoder may search: the bits by which a window of the trellis is longer than its step. One more takes twice as long."""

    FAST = 9
    DEFAULT = 13
    HIGH = 14
    MAX = 15

    def window_bits(self, step_bits: int) -> int:
        """The window at this many bits per step of two weights."""
        return min(step_bits + self.value, MAX_WINDOW_BITS)

    def trellis(self, step_bits: int) -> TrellisQuantizer:
        """The trellis quantizer of this many bits per step of two weights."""
        return TrellisQuantizer(step_bits, self.window_bits(step_bits))

    def __str__(self) -> str:
        """The name that `parse` reads back."""
        return self.name.lower()

    @staticmethod
    def parse(text: "Effort | str") -> "Effort":
        """The effort of this name, in any case. Raises `QuantizerError` that lists the legal names."""
        if isinstance(text, Effort):
            return text
        try:
            return Effort[text.upper()]
        except (KeyError, AttributeError) as error:
            raise QuantizerError(f"unknown effort {text!r}; known: {', '.join(effort.name.lower() for effort in Effort)}") from error


class Family(Enum):
    """Quantizers of one kind at many rates."""

    TRELLIS = "trellis"
    SCALAR = "scalar"
    PAIRS = "vector, dimension 2"
    QUADRUPLES = "vector, dimension 4"

    def ladder(self, effort: Effort = Effort.DEFAULT) -> tuple[UniformQuantizer, ...]:
        """All uniform quantizers of the family, ascending. effort: of the trellis; the others are searched to the end in any case."""
        match self:
            case Family.TRELLIS:
                return tuple(effort.trellis(step_bits) for step_bits in range(MIN_STEP_BITS, MAX_STEP_BITS + 1))
            case Family.SCALAR:
                return tuple(ScalarQuantizer(bits) for bits in range(1, MAX_BITS + 1))
            case Family.PAIRS:
                return tuple(VectorQuantizer(2, bits) for bits in BITS[2])
            case Family.QUADRUPLES:
                return tuple(VectorQuantizer(4, bits) for bits in BITS[4])


@dataclass(frozen=True)
class Palette:
    """Quantizers at distinct rates, ascending."""

    quantizers: tuple[Quantizer, ...]

    def __post_init__(self) -> None:
        rates = [quantizer.rate for quantizer in self.quantizers]
        if not rates or rates != sorted(set(rates)):
            raise QuantizerError(f"a palette needs one quantizer or more at ascending rates, got {', '.join(map(str, rates)) or 'none'}")

    def at(self, rate: Fraction) -> Quantizer:
        """The quantizer of exactly this rate [bits per weight]. Raises `QuantizerError` if there is none."""
        for quantizer in self.quantizers:
            if quantizer.rate == rate:
                return quantizer
        raise QuantizerError(f"no quantizer of {rate=!s} bits; the palette has {', '.join(str(q.rate) for q in self.quantizers)}")


def default_palette(effort: Effort = Effort.DEFAULT) -> Palette:
    """The least distortion at every quarter bit from 1 to 8: trellis codes at the lower rates, scalar ones at the upper."""
    return palette_of(Family.TRELLIS, Family.SCALAR, effort=effort)


def palette_of(*families: Family, effort: Effort = Effort.DEFAULT) -> Palette:
    """The least distortion that some families reach at each of their rates, and at the quarter bits between."""
    candidates = [quantizer for family in families for quantizer in _with_mixtures(family.ladder(effort))]
    best: dict[Fraction, Quantizer] = {}
    for candidate in sorted(candidates, key=lambda q: (q.rate, q.distortion)):
        best.setdefault(candidate.rate, candidate)
    return Palette(tuple(best.values()))


def trellis_at(rate: Fraction, effort: Effort = Effort.DEFAULT) -> Quantizer:
    """The trellis quantizer of any rate [bits per weight]: a uniform one at half bits, else the two nearest along the input axis.

    Raises `QuantizerError` for a rate that is not from 1 to 6.
    """
    lowest, highest = Fraction(MIN_STEP_BITS, 2), Fraction(MAX_STEP_BITS, 2)
    if not lowest <= rate <= highest:
        raise QuantizerError(f"{rate=!s} must be from {lowest} to {highest} bits per weight")
    step_bits = int(2 * rate)
    low = effort.trellis(step_bits)
    return low if low.rate == rate else MixedRateQuantizer(low, effort.trellis(step_bits + 1), 2 * rate - step_bits)


def _with_mixtures(ladder: tuple[UniformQuantizer, ...]) -> list[Quantizer]:
    """Quantizers of ascending rate, and the mixtures of neighbours at the quarter bits between them."""
    found: list[Quantizer] = list(ladder)
    for low, high in pairwise(ladder):
        gap = high.rate - low.rate
        found += [MixedRateQuantizer(low, high, step * QUARTER / gap) for step in range(1, int(gap / QUARTER))]
    return found


def to_json(quantizer: Quantizer) -> dict[str, Any]:
    """A value that `json.dumps` takes and `from_json` turns back into an equal quantizer."""
    match quantizer:
        case TrellisQuantizer(step_bits, window_bits):
            return {"kind": "trellis", "step_bits": step_bits, "window_bits": window_bits}
        case ScalarQuantizer(bits):
            return {"kind": "scalar", "bits": bits}
        case VectorQuantizer(dimension, bits):
            return {"kind": "vector", "dimension": dimension, "bits": bits}
        case MixedRateQuantizer(low, high, share):
            return {"kind": "mixed", "low": to_json(low), "high": to_json(high), "high_share": [share.numerator, share.denominator]}
    raise QuantizerError(f"{quantizer} has no form in files")


def from_json(value: object) -> Quantizer:
    """The inverse of `to_json`. Raises `QuantizerError` for anything else."""
    kind = value.get("kind") if isinstance(value, dict) else None
    match kind:
        case "trellis":
            step_bits, window_bits = _fields(value, "step_bits", "window_bits")
            return TrellisQuantizer(_integer(step_bits), _integer(window_bits))
        case "scalar":
            (bits,) = _fields(value, "bits")
            return ScalarQuantizer(_integer(bits))
        case "vector":
            dimension, bits = _fields(value, "dimension", "bits")
            return VectorQuantizer(_integer(dimension), _integer(bits))
        case "mixed":
            low, high, share = _fields(value, "low", "high", "high_share")
            return MixedRateQuantizer(_uniform(low), _uniform(high), _fraction(share))
    raise QuantizerError(f"not a quantizer: {_shown(value)}; its kind must be trellis, scalar, vector or mixed")


def _fields(value: object, *names: str) -> list[object]:
    assert isinstance(value, dict)
    if set(value) != {"kind", *names}:
        raise QuantizerError(f"a quantizer of kind {value['kind']} has the fields {', '.join(names)}, got {_shown(value)}")
    return [value[name] for name in names]


def _integer(value: object) -> int:
    if type(value) is not int:
        raise QuantizerError(f"a field of a quantizer must be an integer, got {_shown(value)}")
    return value


def _fraction(value: object) -> Fraction:
    if not isinstance(value, list) or len(value) != 2 or _integer(value[1]) <= 0:
        raise QuantizerError(f"high_share must be [numerator, denominator], got {_shown(value)}")
    return Fraction(_integer(value[0]), _integer(value[1]))


def _uniform(value: object) -> UniformQuantizer:
    if not isinstance(value, dict) or value.get("kind") == "mixed":
        raise QuantizerError(f"a mixture is made of uniform quantizers, got {_shown(value)}")
    part = from_json(value)
    assert isinstance(part, UniformQuantizer)
    return part


def _shown(value: object) -> str:
    """A value as it may stand in a message, cut to one line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
