"""What a latency model answers: the time of a multiplication and of a transform, from which the time of a fused group follows."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from qpc.errors import ProfileError
from qpc.ir.annotation import LinearShape
from qpc.quant.quantizer import Quantizer


@dataclass(frozen=True)
class Latency:
    """A time [ps], and why it is an estimate: one reason for each part of it that was not measured, none if all were."""

    ps: int
    estimates: tuple[str, ...] = ()

    def __add__(self, other: "Latency") -> "Latency":
        return Latency(self.ps + other.ps, tuple(dict.fromkeys((*self.estimates, *other.estimates))))


class LatencyModel(ABC):
    """Times of one GPU. Each launch is part of the time of what it launches, as in a CUDA graph of them.

    Times never fall when a matrix gets more rows or columns, or a quantizer of the same family a higher rate.
    """

    @property
    @abstractmethod
    def title(self) -> str:
        """The GPU, and where its times come from, in words."""

    @abstractmethod
    def multiplication(self, shape: LinearShape, quantizer: Quantizer | None, batch: int) -> Latency:
        """One product of `batch` rows of activations, transformed if need be, with a weight read from memory.

        quantizer: None multiplies with the weight in bfloat16. Raises `ProfileError` for what the model knows nothing about.
        """

    @abstractmethod
    def transform(self, features: int, batch: int) -> Latency:
        """Signs, Hadamard transform and whatever else makes `batch` rows of activations what a quantized multiplication reads."""

    def latency(self, shape: LinearShape, quantizer: Quantizer | None, batch: int) -> Latency:
        """A linear by itself: the multiplication, after a transform of its input if it is quantized."""
        return self.group((shape,), quantizer, batch)

    def group(self, shapes: Sequence[LinearShape], quantizer: Quantizer | None, batch: int) -> Latency:
        """Linears of one input and one quantizer: one transform, and one multiplication with the rows of all.

        If the rows of all are not known to be faster in one multiplication than in one for each member, it is one for each: fusing is
        never made to look worse than not fusing. Linears that stay in bfloat16 are not fused. shapes: of the same in_features.

        Raises `ProfileError` for no shapes, different in_features, or a batch that is not positive.
        """
        widths = sorted({shape.in_features for shape in shapes})
        if len(widths) != 1:
            raise ProfileError(f"a group needs linears of one in_features, got {', '.join(map(str, widths)) or 'no linears'}")
        if batch < 1:
            raise ProfileError(f"{batch=} must be positive")
        apart = _total([self.multiplication(shape, quantizer, batch) for shape in shapes])
        if quantizer is None:
            return apart
        stacked = LinearShape(sum(shape.out_features for shape in shapes), widths[0])
        together = apart if len(shapes) == 1 else self.multiplication(stacked, quantizer, batch)
        return self.transform(widths[0], batch) + min(together, apart, key=lambda latency: latency.ps)


def _total(latencies: Sequence[Latency]) -> Latency:
    return sum(latencies[1:], start=latencies[0])
