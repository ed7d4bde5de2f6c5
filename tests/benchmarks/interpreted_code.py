"""Compare the folded code in Triton's interpreter with numpy: `TRITON_INTERPRET=1 python -m tests.benchmarks.interpreted_code`."""
# mypy: allow-untyped-defs, allow-untyped-decorators

import numpy as np
import torch
import triton
import triton.language as tl

from benchmarks.codes.__main__ import WINNER


@triton.jit
def _decode(words, out, SPREAD: tl.constexpr, FOLD: tl.constexpr, MIX: tl.constexpr, SHIFT: tl.constexpr, COUNT: tl.constexpr):
    lanes = tl.arange(0, COUNT)
    h1 = (tl.load(words + lanes).to(tl.uint32, bitcast=True) * SPREAD).to(tl.uint32)
    h2 = ((h1.to(tl.int32, bitcast=True).to(tl.int64) * FOLD) >> 32).to(tl.uint32)
    h3 = (h2 * MIX + SHIFT).to(tl.uint32)
    for column in tl.static_range(2):
        first = ((h2 >> (16 * column)) & 0x8FFF).to(tl.uint16).to(tl.float16, bitcast=True)
        second = ((h3 >> (16 * column)) & 0x8FFF).to(tl.uint16).to(tl.float16, bitcast=True)
        tl.store(out + 2 * lanes + column, first + second)


def main() -> None:
    """Every window of 12 bits, and 4096 of 16, under random garbage above the window."""
    generator = np.random.default_rng(0)
    for window_bits in (12, 16):
        windows = np.arange(4096, dtype=np.int64) << (window_bits - 12)
        garbage = generator.integers(0, 1 << (32 - window_bits), 4096) << window_bits
        words = torch.from_numpy((windows | garbage).astype(np.uint32).view(np.int32))
        out = torch.empty(4096, 2, dtype=torch.float16)
        spread = (WINNER.spread << (32 - window_bits)) & 0xFFFFFFFF
        _decode[(1,)](words, out, spread, WINNER.fold, WINNER.mix, WINNER.shift, 4096)
        expected = WINNER.decode(window_bits)[windows]
        assert np.array_equal(out.double().numpy(), expected), f"{window_bits=}"
    print("equal")


if __name__ == "__main__":
    main()
