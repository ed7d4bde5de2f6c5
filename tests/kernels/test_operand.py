"""The operand of the integer multiplication: fixed point of 16 bits, taken apart and put together again."""

import pytest
import torch

from qpc.errors import KernelError
from qpc.kernels.operand import PEAK, SELECT_HIGH, SELECT_LOW, operand_rows, pack_operand, peak_scales, unpack_operand
from qpc.quant.layout import column_blocks


def activations(batch: int, features: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of very different size, one of zeros, one with a spike."""
    x = torch.randn(batch, features, generator=torch.Generator().manual_seed(features))
    x[batch // 2] = 0
    x[-1, features // 3] = 5000
    return (x * torch.logspace(-3, 0.5, batch)[:, None]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("batch", "features"), [(1, 1), (2, 7), (3, 16), (5, 50), (16, 576)])
def test_error_is_half_a_step(batch: int, features: int, dtype: torch.dtype) -> None:
    x = activations(batch, features, dtype)
    words, scales = pack_operand(x)
    assert words.dtype == torch.int32 and words.shape == (column_blocks(features), 2, operand_rows(batch), 2, 4)
    assert torch.equal(scales, peak_scales(x)) and scales.dtype == torch.float32
    error = (unpack_operand(words, scales, features) - x.double()).abs()
    assert (error <= scales.double()[:, None] * (0.5 + PEAK * 2**-23)).all()


def test_columns_beyond_the_last_are_zero() -> None:
    words, scales = pack_operand(activations(3, 37, torch.float32))
    assert not unpack_operand(words, scales.clamp(min=1), 48)[:, 37:].any()


def test_packing_a_packed_activation_changes_nothing() -> None:
    words, scales = pack_operand(activations(4, 100, torch.float32))
    again, _ = pack_operand(unpack_operand(words, scales, 100), scales)
    assert torch.equal(words, again)


def test_every_value_that_fits_comes_back() -> None:
    x = torch.arange(-PEAK, PEAK + 1).double()[None]
    words, _ = pack_operand(x, torch.ones(1))
    assert torch.equal(unpack_operand(words, torch.ones(1), x.shape[1]), x)


def test_values_beyond_the_scale_saturate() -> None:
    x = torch.tensor([[1e6, -1e6, 3.0]])
    words, scales = pack_operand(x, torch.ones(1))
    assert unpack_operand(words, scales, 3).tolist() == [[PEAK, -PEAK, 3]]


def test_bytes_of_a_word() -> None:
    """Columns c and c + 1, twice, in signed bytes; the selectors take them from the fixed-point values."""
    words, _ = pack_operand(torch.tensor([[1000.0, -77.0]]), torch.ones(1))
    for word, shift, select in ((words[0, 0, 0, 0, 0], 8, SELECT_HIGH), (words[0, 0, 0, 1, 0], 0, SELECT_LOW)):
        made = [int(word) >> bit & 0xFF for bit in (0, 8, 16, 24)]
        rounding = 128 if shift else 0
        source = [(value + rounding) >> bit & 0xFF for value in (1000, -77) for bit in (0, 8, 16, 24)]
        assert made == [source[select >> nibble & 0xF] for nibble in (0, 4, 8, 12)]


def test_refuses_what_is_no_batch_of_rows() -> None:
    for x in (torch.ones(3), torch.ones(2, 0), torch.ones(1, 2, 3)):
        with pytest.raises(KernelError, match="batch, in_features"):
            pack_operand(x)
