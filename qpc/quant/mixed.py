"""Rates between those of a family: two quantizers along the input axis of one weight."""

from dataclasses import dataclass
from fractions import Fraction

from qpc.errors import QuantizerError
from qpc.quant.layout import column_blocks
from qpc.quant.quantizer import Quantizer, UniformQuantizer
from qpc.quant.trellis import TrellisQuantizer
from qpc.quant.vector import VectorQuantizer


@dataclass(frozen=True)
class MixedRateQuantizer(Quantizer):
    """The first `round(high_share * block columns)` block columns are coded by `high`, the others by `low`.

    low, high: of one family and, if vector quantizers, of one dimension; `low` at the smaller rate. high_share: between 0 and 1.
    """

    low: UniformQuantizer
    high: UniformQuantizer
    high_share: Fraction

    def __post_init__(self) -> None:
        if self.low.family != self.high.family or _dimension(self.low) != _dimension(self.high):
            raise QuantizerError(f"{self.low} and {self.high} cannot be mixed: they must be of one family and one dimension")
        if self.low.rate >= self.high.rate:
            raise QuantizerError(f"{self.low} must have a smaller rate than {self.high}")
        if not 0 < self.high_share < 1:
            raise QuantizerError(f"high_share={self.high_share} must lie between 0 and 1; use a uniform quantizer at the ends")

    def __str__(self) -> str:
        match self.low, self.high:
            case TrellisQuantizer(_, low), TrellisQuantizer(_, high):
                return f"{self.family} {self.rate} L{low}" + (f"/{high}" if high != low else "")
            case VectorQuantizer(dimension), _:
                return f"{self.family} {self.rate} D{dimension}"
        return f"{self.family} {self.rate}"

    @property
    def family(self) -> str:  # type: ignore[override]
        return self.low.family

    @property
    def rate(self) -> Fraction:
        return self.low.rate + self.high_share * (self.high.rate - self.low.rate)

    @property
    def distortion(self) -> float:
        share = float(self.high_share)
        return share * self.high.distortion + (1 - share) * self.low.distortion

    def parts(self, in_features: int) -> tuple[tuple[UniformQuantizer, int], ...]:
        columns = column_blocks(in_features)
        high = round(self.high_share * columns)
        return tuple((part, width) for part, width in ((self.high, high), (self.low, columns - high)) if width)


def _dimension(quantizer: UniformQuantizer) -> int | None:
    return quantizer.dimension if isinstance(quantizer, VectorQuantizer) else None
