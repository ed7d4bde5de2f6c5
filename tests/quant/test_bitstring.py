import pytest
import torch

from qpc.quant.bitstring import pack, ring_windows


@pytest.mark.parametrize("bits", range(1, 17))
def test_words_hold_the_windows(bits: int) -> None:
    """Against the definition, bit by bit."""
    fields = torch.randint(0, 1 << bits, (3, 2, 64), generator=torch.Generator().manual_seed(bits))
    words = pack(fields, bits)
    assert words.shape == (3, 2, 2 * bits) and words.dtype == torch.int32
    assert torch.equal(ring_windows(words, bits, bits), fields)
    string = [int(words[1, 1, i // 32]) >> (i % 32) & 1 for i in range(64 * bits)]
    for window_bits in {bits, 12, 20} - set(range(bits)):
        windows = ring_windows(words, bits, window_bits)[1, 1].tolist()
        assert windows == [sum(string[(j * bits + i) % len(string)] << i for i in range(window_bits)) for j in range(64)]
