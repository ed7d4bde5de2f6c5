"""Time by counting: a launch, and the bytes over the bandwidth of memory or the weights over the throughput of decoding."""

from dataclasses import dataclass

from qpc.errors import ProfileError
from qpc.ir.annotation import LinearShape
from qpc.latency.model import Latency, LatencyModel
from qpc.quant.quantizer import Quantizer

PS_PER_S = 10**12
BFLOAT16_BYTES = 2


@dataclass(frozen=True)
class Roofline(LatencyModel):
    """A GPU of which no table was measured; all its times are estimates, and say so.

    name: of the GPU. read_bytes_per_s: bandwidth of reading memory. launch_ps: one kernel in a CUDA graph [ps]. decoded_per_s: weights
    that the GPU decodes and multiplies in a second, of any quantizer; None counts bytes alone, which no kernel can beat.

    Raises `ProfileError` unless all are positive.
    """

    name: str
    read_bytes_per_s: int
    launch_ps: int
    decoded_per_s: int | None = None

    def __post_init__(self) -> None:
        for name in ("read_bytes_per_s", "launch_ps", "decoded_per_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ProfileError(f"a roofline needs a positive {name}, got {value}")

    @property
    def title(self) -> str:
        """The GPU, and that nothing was measured."""
        return f"{self.name}, roofline"

    def multiplication(self, shape: LinearShape, quantizer: Quantizer | None, batch: int) -> Latency:
        """Launch, and the longer of reading (weight once, activations in, results out) and decoding. Rounded up."""
        rows, columns = shape.out_features, shape.in_features
        weight = BFLOAT16_BYTES * shape.weights if quantizer is None else quantizer.weight_bytes(rows, columns)
        longest = _ps(weight + BFLOAT16_BYTES * batch * (rows + columns), self.read_bytes_per_s)
        if quantizer is not None and self.decoded_per_s is not None:
            longest = max(longest, _ps(shape.weights, self.decoded_per_s))
        return self._estimate(self.launch_ps + longest)

    def transform(self, features: int, batch: int) -> Latency:
        """A launch: activations lie in the cache."""
        return self._estimate(self.launch_ps)

    def _estimate(self, ps: int) -> Latency:
        return Latency(ps, (f"no latency profile: times are those of a roofline of {self.name}",))


def _ps(amount: int, per_s: int) -> int:
    return -(-amount * PS_PER_S // per_s)


H100 = Roofline("NVIDIA H100 80GB", read_bytes_per_s=3_086_000_000_000, launch_ps=1_000_000, decoded_per_s=4_800_000_000_000)
"""The default. Bandwidth: a sum over 1 GiB. Launch: an empty kernel in a CUDA graph. Decoding: what the first Triton kernel reached on the
four linears of a layer of Llama 3.1 8B at 3 bit and batch 1, 218 M weights in 49.2 us of which 4 us are launches."""

H200 = Roofline("NVIDIA H200", read_bytes_per_s=4_312_000_000_000, launch_ps=953_000, decoded_per_s=4_800_000_000_000)
"""Measured in the same way; the same processor decodes."""
