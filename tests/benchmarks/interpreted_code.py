"""Compare the folded codes in Triton's interpreter with numpy: `TRITON_INTERPRET=1 python -m tests.benchmarks.interpreted_code`."""
# mypy: allow-untyped-defs, allow-untyped-decorators

import numpy as np
import torch
import triton
import triton.language as tl

from benchmarks.codes.__main__ import HIGH_RATES, LOW_RATES


@triton.jit
def _decode(
    words, out, SPREAD: tl.constexpr, FOLD: tl.constexpr, MIX: tl.constexpr, SHIFT: tl.constexpr, STRETCH: tl.constexpr, COUNT: tl.constexpr
):
    lanes = tl.arange(0, COUNT)
    h1 = (tl.load(words + lanes).to(tl.uint32, bitcast=True) * SPREAD).to(tl.uint32)
    h2 = ((h1.to(tl.int32, bitcast=True).to(tl.int64) * FOLD) >> 32).to(tl.uint32)
    h3 = (h2 * MIX + SHIFT).to(tl.uint32)
    for column in tl.static_range(2):
        first = ((h2 >> (16 * column)) & 0x8FFF).to(tl.uint16).to(tl.float16, bitcast=True)
        second = ((h3 >> (16 * column)) & 0x8FFF).to(tl.uint16).to(tl.float16, bitcast=True)
        if STRETCH:
            size = (((h3 >> (16 * column)) & STRETCH) ^ 0x3C00).to(tl.uint16).to(tl.float16, bitcast=True)
            pair = (first.to(tl.float32) * size.to(tl.float32) + second.to(tl.float32)).to(tl.float16)
        else:
            pair = first + second
        tl.store(out + 2 * lanes + column, pair)


def main() -> None:
    """Every window of 12 bits, and 4096 of 16, under random garbage above the window."""
    generator = np.random.default_rng(0)
    for window_bits, code, stretch in ((w, c, s) for w in (12, 16) for c, s in ((LOW_RATES, 0), (HIGH_RATES, HIGH_RATES.stretch))):
        windows = np.arange(4096, dtype=np.int64) << (window_bits - 12)
        garbage = generator.integers(0, 1 << (32 - window_bits), 4096) << window_bits
        words = torch.from_numpy((windows | garbage).astype(np.uint32).view(np.int32))
        out = torch.empty(4096, 2, dtype=torch.float16)
        spread = (code.spread << (32 - window_bits)) & 0xFFFFFFFF
        _decode[(1,)](words, out, spread, code.fold, code.mix, code.shift, stretch, 4096)
        assert np.array_equal(out.double().numpy(), code.decode(window_bits)[windows]), f"{code.name} {window_bits=}"
    print("equal")


if __name__ == "__main__":
    main()
